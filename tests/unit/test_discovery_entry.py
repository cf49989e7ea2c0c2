"""What the hub's facts are taken to mean."""

import pytest

from mlxgui_grpc.discovery_entry import description, fit, is_loadable, kind, model_type, not_served
from mlxgui_grpc.hub_frames import Repository

GIB = 1024**3
ID = "mlx-community/Llama-3.2-3B-Instruct-4bit"
MLX = {"tags": ["mlx"], "library_name": "mlx"}


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({**MLX, "quantization_bits": 4}, "Llama 3.2 3B Instruct quantized to 4-bit with MLX"),
        (
            {**MLX, "quantization_bits": 8, "base_model": "maker/Other_Name"},
            "Other Name quantized to 8-bit with MLX",
        ),
        (MLX, "Llama 3.2 3B Instruct converted to run with MLX"),
        ({**MLX, "card_description": "Made by hand."}, "Made by hand."),
        (
            {"architecture": "llama", "pipeline_tag": "text-generation"},
            "Llama 3.2 3B Instruct: llama model for text generation",
        ),
        ({"architecture": "llama"}, "Llama 3.2 3B Instruct: llama model"),
        ({"pipeline_tag": "fill-mask"}, "Llama 3.2 3B Instruct: model for fill mask"),
        ({}, ""),
    ],
)
def test_a_description_says_what_is_known(facts: dict[str, object], sentence: str) -> None:
    assert description(Repository(ID, **facts)) == sentence  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"pipeline_tag": "text-generation"}, "text"),
        ({"pipeline_tag": "image-text-to-text"}, "vision"),
        ({"pipeline_tag": "any-to-any"}, "multimodal"),
        ({"pipeline_tag": "text-to-speech"}, "audio"),
        ({"pipeline_tag": "sentence-similarity"}, "feature-extraction"),
        ({"pipeline_tag": "text-to-image"}, "text-to-image"),
        ({"tags": ["mlx", "automatic-speech-recognition"]}, "audio"),
        ({"tags": ["mlx"]}, ""),
    ],
)
def test_the_hubs_tasks_have_words_of_ours(facts: dict[str, object], word: str) -> None:
    assert model_type(Repository(ID, **facts)) == word  # type: ignore[arg-type]


def test_plain_safetensors_of_a_known_architecture_load() -> None:
    """What another library has quantized does not, nor does what runs code of its own."""
    architectures = frozenset({"llama"})
    plain = {"has_safetensors": True, "architecture": "llama"}
    assert is_loadable(Repository(ID, **MLX), architectures)  # type: ignore[arg-type]
    assert is_loadable(Repository(ID, **plain), architectures)  # type: ignore[arg-type]
    for change in ({"has_safetensors": False}, {"architecture": "own"}, {"quantization_method": "gptq"}):
        assert not is_loadable(Repository(ID, **{**plain, **change}), architectures)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "loads", "refused"),
    [
        ({}, True, ""),
        ({"architecture": "llama", "pipeline_tag": "text-generation"}, True, ""),
        ({"architecture": "frobnicate"}, False, "frobnicate"),
        ({"architecture": "frobnicate", "pipeline_tag": "text-generation"}, False, "frobnicate"),
        ({"architecture": "frobnicate", "type": "text"}, False, "frobnicate"),
        ({"type": "text"}, False, "such"),
        ({"architecture": "llama", "pipeline_tag": "image-text-to-text"}, True, ""),
        ({"architecture": "llava", "pipeline_tag": "any-to-any"}, True, "llava"),
        ({"architecture": "llava", "type": "vision", "pipeline_tag": "text-generation"}, True, "llava"),
        ({"architecture": "llama", "type": "text", "pipeline_tag": "image-text-to-text"}, True, ""),
        ({"architecture": "llama", "type": "text", "pipeline_tag": "feature-extraction"}, True, ""),
        ({"architecture": "bert", "type": "embedding"}, True, "bert"),
        ({"architecture": "kokoro", "pipeline_tag": "text-to-speech"}, True, "audio"),
        ({"pipeline_tag": "text-to-image"}, True, "text-to-image"),
    ],
)
def test_a_tag_is_no_promise_that_this_version_serves_it(
    facts: dict[str, object], loads: bool, refused: str
) -> None:
    """What MLX loads and what this version serves are two questions; the verdict names what it does not serve."""
    architectures = frozenset({"llama"})
    repository = Repository(ID, **MLX, **facts)  # type: ignore[arg-type]
    assert is_loadable(repository, architectures) is loads
    refusal = not_served(repository, architectures)
    assert refusal == (f"❌ This version does not serve {refused} models" if refused else "")
    verdict = fit(repository, is_loadable=loads, refusal=refusal, required_bytes=1, available_bytes=GIB)
    assert verdict.is_compatible is (not refused) and (not refused or verdict.message == refusal)


def test_a_kind_is_what_the_files_say_before_what_a_tag_says() -> None:
    """Where both are about text and images: such tags are inherited."""
    assert kind(Repository(ID, type="text", pipeline_tag="image-text-to-text")) == "text"
    assert kind(Repository(ID, type="text", pipeline_tag="automatic-speech-recognition")) == "audio"
    assert kind(Repository(ID)) == ""


@pytest.mark.parametrize(
    ("required", "available", "is_compatible", "message"),
    [
        (2.5, 18.5, True, "✅ Compatible - 18.5GB available, 2.5GB required"),
        (
            32.0,
            18.5,
            False,
            "❌ Insufficient memory - This model requires 32.0GB but you have 18.5GB available",
        ),
        (None, 18.5, None, "Unknown - 18.5GB available, the hub does not tell the size"),
    ],
)
def test_the_verdict_is_the_documents_sentence(
    required: float | None, available: float, is_compatible: bool | None, message: str
) -> None:
    verdict = fit(
        Repository(ID),
        is_loadable=True,
        required_bytes=None if required is None else int(required * GIB),
        available_bytes=int(available * GIB),
    )
    assert (verdict.is_compatible, verdict.message) == (is_compatible, message)


def test_where_mlx_does_not_run_nothing_does() -> None:
    verdict = fit(
        Repository(ID), is_loadable=True, required_bytes=1, available_bytes=GIB, hardware_error="no device"
    )
    assert (verdict.is_compatible, verdict.message) == (
        False,
        "❌ MLX requires Apple Silicon (M1/M2/M3) hardware",
    )


def test_a_repository_for_others_names_its_mlx_version() -> None:
    """Where there is one."""
    repository = Repository("maker/Base", mlx_repository=ID)
    for known, words in ((repository, f"install {ID} instead"), (Repository(ID), "no MLX version")):
        verdict = fit(known, is_loadable=False, required_bytes=1, available_bytes=GIB)
        assert verdict.is_compatible is False and words in verdict.message
