"""Memory: what a config.json says about caches, what an estimate adds up to, how sizes read."""

from typing import Any

import pytest

from mlxgui_grpc import memory

LLAMA_3_2_3B: dict[str, Any] = {
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 3072,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA_3_2_3B, 2 * 28 * 8 * 128 * 2),
        ({**LLAMA_3_2_3B, "torch_dtype": "float32"}, 2 * 28 * 8 * 128 * 4),
        ({"text_config": LLAMA_3_2_3B, "model_type": "some-vlm"}, 2 * 28 * 8 * 128 * 2),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 2 * 2 * 4 * 16 * 2),
        ({"num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 27 * 576 * 2),
        ({}, 0),
        ({"num_hidden_layers": "many", "num_attention_heads": -1}, 0),
    ],
)
def test_bytes_per_token_follow_from_the_shapes(config: dict[str, Any], expected: int) -> None:
    assert memory.kv_bytes_per_token(config) == expected


def test_an_estimate_is_the_sum_of_its_parts() -> None:
    found = memory.estimate(1000, 10, token_count=300, request_count=4, process_bytes=7)
    assert (found.weight_bytes, found.process_bytes) == (1000, 7)
    assert found.kv_bytes == 4 * 512 * 10, "caches grow by 256 tokens"
    assert found.prefill_bytes == int(1.9 * 512 * 10), "one request prefills at a time"
    assert found.required_bytes == 1000 + 20480 + 9728 + 7


def test_a_short_context_holds_no_more_than_itself() -> None:
    assert memory.estimate(0, 1, context_length=100, process_bytes=0).kv_bytes == 256


def test_the_documented_sentence() -> None:
    text = memory.insufficient_memory_text(32 * memory.GIB, int(18.5 * memory.GIB))
    assert text == "❌ Insufficient memory - This model requires 32.0GB but you have 18.5GB available"


def test_the_machine_has_memory_and_some_of_it_is_free() -> None:
    machine = memory.read_machine_memory()
    assert 0 < machine.available_bytes <= machine.total_bytes
    assert machine.used_bytes == machine.total_bytes - machine.available_bytes
    assert 0 <= machine.percent_used <= 100
