"""Model folders from strangers: what is read of them, what a loader sees, and what is refused."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxgui_grpc import checkpoint, model_view
from mlxgui_grpc.errors import ModelIncompatibleError, ModelServerError, ModelUnsafeError
from mlxgui_grpc.known_architectures import text_architectures
from tests.support_models import DEMO, build_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny(tmp_path / "model")


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_the_demo_model_is_what_it_is() -> None:
    found = checkpoint.inspect(DEMO)
    assert (found.type, found.architecture, found.context_length) == ("text", "qwen3", 4096)
    assert found.has_chat_template and "<think>" in found.template
    assert found.weight_bytes < (DEMO / "model.safetensors").stat().st_size <= found.size_bytes
    assert found.memory_bytes > found.weight_bytes and found.parameter_count > 100_000
    checkpoint.require_loadable(found)


def test_a_view_has_the_data_and_nothing_that_runs(folder: Path, tmp_path: Path) -> None:
    """Python files, pickles, archives, folders and hidden files stay out; JSON that names code is cleaned of it."""
    for name in (
        "modeling.py",
        "tokenizer.pkl",
        "pytorch_model.bin",
        "x.pt",
        "y.ckpt",
        "lib.so",
        ".hidden",
        "README.md",
    ):
        (folder / name).write_bytes(b"import os")
    (folder / "sub").mkdir()
    (folder / "sub" / "z.py").write_text("")
    set_config(folder, auto_map={"AutoModel": "modeling.Model"}, custom_pipelines={"a": 1})
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
        )
    )
    view = model_view.make_view(folder, tmp_path / "views" / "1")
    assert {path.name for path in view.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for name in ("config.json", "tokenizer_config.json"):
        assert not (view / name).is_symlink()
        assert not {"auto_map", "custom_pipelines"} & json.loads((view / name).read_text()).keys()
    assert json.loads((view / "config.json").read_text())["model_type"] == "llama"
    assert (view / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()
    assert view.stat().st_mode & 0o077 == 0


def test_a_view_is_made_anew_and_removed(folder: Path, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    (view / "stale.py").write_text("")
    model_view.make_view(folder, view)
    assert not (view / "stale.py").exists()
    model_view.remove_view(view)
    model_view.remove_view(view)
    assert not view.exists() and (folder / "model.safetensors").exists()


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def tensor(start: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x02",
    "header of 2^63": safetensors({}, length=2**63),
    "header of 2^64 - 1": safetensors({}, length=2**64 - 1),
    "header longer than the file": safetensors({}, length=1000),
    "no JSON": safetensors(b"\xff\xfe{{"),
    "deep JSON": safetensors(b"[" * 100_000),
    "a list": safetensors([1, 2]),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [1]}}),
    "tensor is no object": safetensors({"a": 5}),
    "offsets are words": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}),
    "one offset": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
    "truncated": safetensors({"a": tensor(0, 400)}, b"\0" * 399),
    "overlap": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
    "backwards": safetensors({"a": tensor(8, 0)}, b"\0" * 8),
    "negative": safetensors({"a": tensor(-8, 8)}, b"\0" * 8),
    "beyond": safetensors({"a": tensor(0, 2**62)}, b"\0" * 8),
    "shape beyond its bytes": safetensors({"a": tensor(0, 8, [10**12, 10**12])}, b"\0" * 8),
    "shape below its bytes": safetensors({"a": tensor(0, 8, [1])}, b"\0" * 8),
    "negative shape": safetensors({"a": tensor(0, 8, [-1, -2])}, b"\0" * 8),
    "endless offsets": safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'),
    "unknown type of many": safetensors(
        {"a": {"dtype": "F2", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8
    ),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_safetensors_file_is_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    for action in (checkpoint.inspect, lambda path: model_view.make_view(path, path.parent / "view")):
        with pytest.raises(ModelIncompatibleError, match=r"model\.safetensors is damaged"):
            action(folder)


def write_big(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(checkpoint.MAX_CONFIG_BYTES + 1)


CHANGES: dict[str, tuple[type[ModelServerError], Callable[[Path], Any]]] = {
    "model_file": (ModelUnsafeError, lambda f: set_config(f, model_file="evil.py")),
    "auto_map without architecture": (
        ModelUnsafeError,
        lambda f: set_config(f, auto_map={"AutoModel": "m.M"}, model_type="mystery"),
    ),
    "config is no file": (ModelIncompatibleError, lambda f: (f / "config.json").unlink()),
    "config is a list": (ModelIncompatibleError, lambda f: (f / "config.json").write_text("[1]")),
    "config is deep": (
        ModelIncompatibleError,
        lambda f: (f / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    ),
    "config is huge": (ModelIncompatibleError, lambda f: write_big(f / "config.json")),
    "config is no UTF-8": (
        ModelIncompatibleError,
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xfd"),
    ),
    "config has a huge number": (
        ModelIncompatibleError,
        lambda f: (f / "config.json").write_text('{"model_type": ' + "9" * 10_000 + "}"),
    ),
    "architecture is half a character": (
        ModelIncompatibleError,
        lambda f: set_config(f, model_type="\ud800"),
    ),
    "architecture is a list": (
        ModelIncompatibleError,
        lambda f: set_config(f, model_type=[], auto_map={"a": 1}),
    ),
    "architecture is long": (ModelIncompatibleError, lambda f: set_config(f, model_type="a" * 65)),
    "cache of no machine": (
        ModelIncompatibleError,
        lambda f: set_config(
            f, num_hidden_layers=2**31 - 1, num_key_value_heads=2**31 - 1, head_dim=2**31 - 1
        ),
    ),
    "no weights": (ModelIncompatibleError, lambda f: (f / "model.safetensors").unlink()),
    "pickles only": (
        ModelIncompatibleError,
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    ),
}


@pytest.mark.parametrize(("error", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_what_is_no_safe_model_is_refused(
    folder: Path, error: type[ModelServerError], change: Callable[[Path], Any]
) -> None:
    change(folder)
    with pytest.raises(error):
        checkpoint.inspect(folder)


def test_odd_values_in_a_config_are_read_as_unknown(folder: Path) -> None:
    set_config(
        folder,
        max_position_embeddings="many",
        num_hidden_layers=-1,
        quantization=[4],
        text_config=7,
        num_attention_heads=0,
        hidden_size=True,
    )
    found = checkpoint.inspect(folder)
    assert (found.context_length, found.quantization_bits) == (0, 0)
    set_config(folder, max_position_embeddings=2**40, quantization={"bits": 2**31})
    found = checkpoint.inspect(folder)
    assert (found.context_length, found.quantization_bits) == (0, 0)


@pytest.mark.parametrize("key", ["chat_template_type", "tool_parser_type"])
@pytest.mark.parametrize("value", ["../evil", "os.path", "a/b", "a b", ["x"]])
def test_a_name_of_a_module_must_be_a_plain_one(
    folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    """mlx-lm imports modules of its own package by these keys: nothing else may be named."""
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ModelUnsafeError, match="module"):
        model_view.make_view(folder, tmp_path / "view")


def test_links_out_of_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(secret)
    with pytest.raises(ModelUnsafeError, match=r"special_tokens_map\.json links to a place outside"):
        model_view.make_view(folder, tmp_path / "view")


def test_links_into_the_repository_s_blobs_are_followed(folder: Path, tmp_path: Path) -> None:
    """As the Hugging Face cache has them; from one repository into another they are refused."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in folder.iterdir():
        (repository / "blobs" / f"hash-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(
            os.path.relpath(repository / "blobs" / f"hash-{file.name}", snapshot)
        )
    view = model_view.make_view(snapshot, tmp_path / "view")
    assert (view / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size

    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    with pytest.raises(ModelUnsafeError):
        model_view.make_view(snapshot, tmp_path / "view")


def test_weights_of_another_name_are_shown_under_one_that_mlx_lm_reads(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.00.safetensors")
    view = model_view.make_view(folder, tmp_path / "view")
    assert (view / "model-weights.00.safetensors").exists()


def test_fifos_and_devices_are_not_opened(folder: Path, tmp_path: Path) -> None:
    """Reading one would never end."""
    os.mkfifo(folder / "added_tokens.json")
    checkpoint.inspect(folder)
    assert "added_tokens.json" not in {
        path.name for path in model_view.make_view(folder, tmp_path / "v").iterdir()
    }


def test_the_architectures_are_mlx_lm_s_own() -> None:
    """Read from its source without importing it; utilities are not among them, aliases are."""
    known = text_architectures()
    assert {"llama", "qwen3", "mistral"} <= known
    assert not known & {"base", "cache", "__init__"}


def test_models_of_another_kind_are_known_and_not_served_yet(folder: Path) -> None:
    set_config(folder, model_type="whisper")
    found = checkpoint.inspect(folder)
    assert found.type == "transcription"
    with pytest.raises(ModelIncompatibleError, match="transcription"):
        checkpoint.require_loadable(found)


def test_vision_models_are_those_of_mlx_vlm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its package or mlx-lm knows; without the package the way to it is said."""
    set_config(folder, model_type="qwen2_vl", vision_config={})
    found = checkpoint.inspect(folder)
    assert found.type == "vision"
    checkpoint.require_loadable(found)
    set_config(folder, model_type="unheard_of", vision_config={})
    with pytest.raises(ModelIncompatibleError, match="mlx-vlm does not know the architecture 'unheard_of'"):
        checkpoint.require_loadable(checkpoint.inspect(folder))
    monkeypatch.setitem(checkpoint._GENERATING, "vision", ("mlx-vlm", frozenset))
    with pytest.raises(ModelIncompatibleError, match=r"install mlxgui-grpc\[vision\]"):
        checkpoint.require_loadable(found)


def test_settings_of_parts_name_no_code_either(folder: Path, tmp_path: Path) -> None:
    nested = {
        "image_processor": {"auto_map": {"AutoImageProcessor": "x.Y"}, "size": 3},
        "parts": [{"auto_map": 1}],
    }
    (folder / "processor_config.json").write_text(json.dumps(nested))
    view = model_view.make_view(folder, tmp_path / "view")
    cleaned = json.loads((view / "processor_config.json").read_text())
    assert cleaned == {"image_processor": {"size": 3}, "parts": [{}]}
