"""What a model is for: its files decide, and the name of its repository only where they say nothing."""

import re
from typing import Any

import pytest

from mlxgui_grpc.known_architectures import text_architectures, vision_architectures
from mlxgui_grpc.model_types import type_of
from tests.support_document import statements


@pytest.mark.parametrize(
    ("architecture", "config", "repository", "expected"),
    [
        ("qwen2_vl", {"vision_config": {}}, "", "vision"),
        ("gemma3", {"vision_config": {"image_size": 896}}, "x/gemma-3-4b-it", "vision"),
        ("gemma3n", {"vision_config": {}}, "mlx-community/gemma-3n-E4B-it-bf16", "vision"),
        ("gemma3", {"vision_config": None}, "x/gemma-3-4b-it-text", "text"),
        ("gemma3_text", {}, "mlx-community/gemma-3-1b-it-4bit", "text"),
        ("llama", {}, "maker/my-vision-llama-llava", "text"),
        ("mistral", {"mm_vision_tower": "openai/clip"}, "", "vision"),
        ("phi3_v", {}, "", "vision"),
        ("idefics3", {}, "", "vision"),
        ("unheard_of", {}, "maker/Multimodal-7B", "vision"),
        ("unheard_of", {}, "vision-lab/words-7b", "text"),
        ("", {}, "mlx-community/llava-1.5-7b-4bit", "vision"),
        ("", {}, "maker/something", "text"),
    ],
)
def test_vision_models_are_told_by_their_files_first(
    architecture: str, config: dict[str, Any], repository: str, expected: str
) -> None:
    """The owner's name in the hub id counts for nothing, nor does the name of a model whose architecture is known."""
    assert type_of(architecture, config, has_pooling=False, repository=repository) == expected


def test_the_documented_words_in_a_name_mean_vision_where_the_files_do_not_tell() -> None:
    """In either case."""
    (line,) = (words for line, words in statements() if line == 1009)
    words = re.findall("`([^`]+)`", line)
    assert len(words) == 7
    for word in (*words, *map(str.upper, words)):
        name = f"mlx-community/Some-{word}-7B-4bit"
        assert type_of("unheard_of", {}, has_pooling=False, repository=name) == "vision", word


def test_the_architectures_with_a_tower_are_mlx_vlm_s() -> None:
    """Read without importing it: no text models, embedding models, or models that draw; aliases are among them."""
    known = vision_architectures()
    assert {"qwen2_vl", "qwen3_vl", "smolvlm", "llava", "gemma3n", "lfm2-vl", "phi3_v", "pixtral"} <= known
    assert not known & {"llama", "qwen3", "bert", "flux2", "cache"}
    assert {"gemma3", "qwen3_vl"} <= known & text_architectures()
