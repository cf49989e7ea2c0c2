"""Embedding models and cross-encoders on the disk: what they are taken for, how they pool, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxgui_grpc import checkpoint, model_view
from mlxgui_grpc.encoders import POOLING_FILE
from mlxgui_grpc.errors import ModelIncompatibleError, ModelUnsafeError
from mlxgui_grpc.model_types import type_of
from tests.support_encoders import EMBEDDERS, MAX_TOKENS, RERANKERS, build_encoder

POOLINGS = {"bert-cls": "cls", "qwen3": "last_token"}


def change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedding_model_says_how_it_pools(tmp_path: Path, name: str) -> None:
    found = checkpoint.inspect(build_encoder(tmp_path / "m", name))
    checkpoint.require_loadable(found)
    assert found.type == "embedding" and found.encoder is not None
    assert found.encoder.pooling == POOLINGS.get(name, "mean")
    assert (found.encoder.is_pooling_assumed, found.encoder.dimensions) == (False, 48)
    # RoBERTa's positions begin after its padding token; nobody keeps keys and values.
    assert found.context_length == (4096 if name == "qwen3" else MAX_TOKENS)
    assert found.kv_bytes_per_token == 0 and found.batch_bytes > 0


@pytest.mark.parametrize("name", RERANKERS)
def test_a_classifier_with_one_label_is_a_reranker(tmp_path: Path, name: str) -> None:
    found = checkpoint.inspect(build_encoder(tmp_path / "m", name))
    checkpoint.require_loadable(found)
    assert found.type == "reranker" and found.encoder is not None
    assert (found.encoder.pooling, found.encoder.dimensions) == (None, 0)
    change(tmp_path / "m" / "config.json", id2label={"0": "yes", "1": "no"})
    found = checkpoint.inspect(tmp_path / "m")
    assert found.type == "classification"
    with pytest.raises(ModelIncompatibleError, match="a model for classification"):
        checkpoint.require_loadable(found)


def test_without_a_pooling_file_the_family_s_habit_is_taken_and_said(tmp_path: Path) -> None:
    folder = build_encoder(tmp_path / "m", "bert", with_pooling_file=False)
    encoder = checkpoint.inspect(folder).encoder
    assert encoder is not None and (encoder.pooling, encoder.is_pooling_assumed) == ("mean", True)


def test_the_hub_s_name_decides_only_where_the_files_leave_it_open(tmp_path: Path) -> None:
    """A conversion has lost the files of sentence-transformers. What a user calls a folder says nothing."""
    snapshot = tmp_path / "models--maker--Qwen3-Embedding-0.6B-4bit" / "snapshots" / "0123"
    folder = build_encoder(snapshot, "qwen3", with_pooling_file=False)
    found = checkpoint.inspect(folder)
    assert found.type == "embedding" and found.encoder is not None
    assert (found.encoder.pooling, found.encoder.is_pooling_assumed) == ("last_token", True)
    folder = build_encoder(tmp_path / "Qwen3-Embedding", "qwen3", with_pooling_file=False)
    assert checkpoint.inspect(folder).type == "text"
    vision: dict[str, Any] = {"vision_config": {}}
    assert type_of("qwen3_vl", vision, has_pooling=False, repository="a/Embedding-VL") == "vision"


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last_token"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": "yes"}, "mean"),  # no truth: as if it were not there
    ],
)
def test_both_forms_of_the_pooling_file_are_read(
    tmp_path: Path, content: dict[str, Any], pooling: str
) -> None:
    folder = build_encoder(tmp_path / "m", "bert")
    (folder / POOLING_FILE).write_text(json.dumps(content))
    found = checkpoint.inspect(folder)
    checkpoint.require_loadable(found)
    assert found.encoder is not None and found.encoder.pooling == pooling


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (POOLING_FILE, '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}', "cls and mean"),
        (POOLING_FILE, '{"pooling_mode": "attention"}', "pools by attention"),
        (POOLING_FILE, '{"pooling_mode": "mean", "include_prompt": false}', "leaves a prompt out"),
        (POOLING_FILE, "{", "cannot be read"),
        (POOLING_FILE, "[" * 100_000, "cannot be read"),
        (POOLING_FILE, " " * 1_100_000, "larger than 1 MiB"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense"}]', "'Dense'"),
        ("config.json", {"hidden_act": "relu"}, "'relu'"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative positions"),
        ("config.json", {"model_type": "mpnet"}, "'mpnet'"),
    ],
)
def test_what_would_be_computed_wrong_is_refused(
    tmp_path: Path, file: str, content: str | dict[str, Any], words: str
) -> None:
    folder = build_encoder(tmp_path / "m", "bert")
    if isinstance(content, str):
        (folder / file).write_text(content)
    else:
        change(folder / file, **content)
    found = checkpoint.inspect(folder)
    assert found.type == "embedding"
    with pytest.raises(ModelIncompatibleError, match=words):
        checkpoint.require_loadable(found)


def test_a_view_has_the_pooling_file_and_no_other_folder(tmp_path: Path) -> None:
    folder = build_encoder(tmp_path / "m", "bert")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"")
    (folder / "1_Pooling" / "code.py").write_text("")
    view = model_view.make_view(folder, tmp_path / "view")
    assert {str(path.relative_to(view)) for path in view.rglob("*.*")} == {
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_pooling_file_from_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = build_encoder(tmp_path / "m", "bert")
    (tmp_path / "secret.json").write_text("{}")
    (folder / POOLING_FILE).unlink()
    (folder / POOLING_FILE).symlink_to(tmp_path / "secret.json")
    with pytest.raises(ModelUnsafeError, match=r"1_Pooling/config\.json"):
        model_view.make_view(folder, tmp_path / "view")
