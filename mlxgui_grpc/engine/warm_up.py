"""What a worker process does before it is given a model: it chooses its device and pays for everything lazy."""

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.batch import DecodeBatch, Prefill
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults


def warm_up() -> frames.Ready:
    """Pay now for what the first load would pay: lazy imports and the first operation on the device.

    Loading any tokenizer costs 2 CPU seconds of imports in transformers, once per process.
    """
    mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    _run_tiny_model()
    from mlx_lm.tokenizer_utils import load as load_tokenizer_wrapper
    from tokenizers import Tokenizer, models

    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"})
        )
        Path(folder, "config.json").write_text('{"model_type": "llama"}')
        tokenizer: Any = load_tokenizer_wrapper(Path(folder))
        tokenizer._tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    packages = ("mlx", "mlx-lm", "transformers", "tokenizers")
    return _ready({name: importlib.metadata.version(name) for name in packages})


def _ready(versions: dict[str, str]) -> frames.Ready:
    """What this process computes on."""
    device = mx.default_device()
    facts = mx.device_info(device)
    is_gpu = device.type == mx.DeviceType.gpu
    # Only a Mac (the first name) or a CUDA machine (the second) can show that these are right.
    memory = facts.get("max_recommended_working_set_size") or facts.get("total_memory") or 0
    return frames.Ready(
        device=str(device),
        versions=versions,
        device_name=str(facts.get("device_name", "")),
        device_memory_bytes=int(memory) if is_gpu else 0,
        is_gpu=is_gpu,
    )


def use_device(*, use_gpu: bool) -> None:
    """Compute on the GPU, if there is one, or on the CPU. For the thread that calls, which is the one that computes."""
    wanted = mx.gpu if use_gpu and mx.is_available(mx.gpu) else mx.cpu
    if mx.default_device().type != wanted:
        mx.set_default_device(mx.Device(wanted))


def _run_tiny_model() -> None:
    """Decode some tokens with random weights: compiles, or fetches from MLX's cache, what every model needs."""
    from mlx_lm.models import llama, qwen3

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "max_position_embeddings": 64}
    numbers = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True}
    for module, name in ((llama, "llama"), (qwen3, "qwen3")):
        model: Any = module.Model(module.ModelArgs.from_dict({"model_type": name, **sizes, **numbers}))
        warm_up_model(model)


def warm_up_model(model: Any) -> None:
    """Run a prefill of two rows and a decode step, greedy and sampled, so that no request pays for the first."""
    sampled = frames.Sampling(temperature=1.0, top_p=0.9)
    rows = [RowSampling(sampling, SamplingDefaults(), 0, [0], 2) for sampling in (frames.Sampling(), sampled)]
    prefill = Prefill(model, rows, [[0, 0], [0, 0, 0]])
    prefill.advance(8)
    batch: DecodeBatch[RowSampling] = DecodeBatch(model, lambda row: row)
    batch.join(prefill.rows, prefill.last_tokens, prefill.cache)
    batch.step()
    batch.step()


def leave_wired_limit_alone() -> None:
    """mlx-lm raises the wired limit to the recommended size, which has panicked kernels: never let it."""
    mx.set_wired_limit = lambda limit: 0
