"""A model whose architecture is not batched: GetModel says so before it is loaded, in the words of the load."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxgui.v1 import model_pb2, model_pb2_grpc
from mlxgui_grpc.engine.backends.text import load_text_model
from tests.support_architectures import SHARED, build
from tests.support_calls import last_operation
from tests.support_models import DEMO, TOKENIZER_FILES


def test_get_model_says_that_requests_run_one_at_a_time(
    local_models: model_pb2_grpc.ModelServiceStub, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny-serial"
    folder.mkdir()
    config = {**SHARED, "vocab_size": 1024, "window_size": 24, "sliding_window_pattern": 2}
    config |= {"model_type": "plamo3", "architectures": ["Plamo3ForCausalLM"], "eos_token_id": 2}
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    weights: Any = tree_flatten(build("plamo3", configuration=config).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), metadata={"format": "mlx"})

    name = folder.name
    request = model_pb2.InstallModelRequest(local_directory=str(folder), name=name)
    assert last_operation(local_models.InstallModel(request)).success.name == name

    try:
        model = local_models.GetModel(model_pb2.GetModelRequest(name=name)).model
    finally:
        local_models.DeleteModel(model_pb2.DeleteModelRequest(name=name, force=True))
    assert model_pb2.CAPABILITY_COMPLETION in model.capabilities
    assert model_pb2.CAPABILITY_BATCHING not in model.capabilities
    assert len(model.notes) == 1 and "one at a time" in model.notes[0]
    loaded = load_text_model(folder)
    assert not loaded.batchable and loaded.notes == tuple(model.notes)
