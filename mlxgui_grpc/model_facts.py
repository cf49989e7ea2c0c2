"""What the registry keeps of a model beside its row's own columns: facts of its files, as JSON."""

import json
from typing import Any

from mlxgui_grpc import checkpoint
from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.reply_facts import has_thinking, takes_tools, tool_format_of

MAIN = "main"
"""The branch of the hub that is meant where none is named."""


def branch_of(model: InstalledModel) -> str:
    """The branch, tag or commit that updates of the model follow."""
    return str(json.loads(model.metadata).get("branch") or MAIN)


def described(found: checkpoint.Checkpoint, branch: str = "") -> dict[str, Any]:
    """What the registry keeps of what the files say, and of the branch they came from."""
    metadata = {
        **({"branch": branch} if branch else {}),
        "architecture": found.architecture,
        "parameter_count": found.parameter_count,
        "weight_bytes": found.weight_bytes,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "batch_bytes": found.batch_bytes,
        "quantization_bits": found.quantization_bits,
        "has_chat_template": found.has_chat_template,
        "has_tools": takes_tools(found.template),
        "has_thinking": has_thinking(found.template),
        "tool_format": tool_format_of(found.template),
    }
    if encoder := found.encoder:
        metadata["pooling"] = encoder.pooling
        metadata["is_pooling_assumed"] = encoder.is_pooling_assumed
        metadata["embedding_dimensions"] = encoder.dimensions
    return {
        "type": found.type,
        "size_bytes": found.size_bytes,
        "memory_bytes": found.memory_bytes,
        "context_length": found.context_length,
        "metadata": json.dumps(metadata),
    }
