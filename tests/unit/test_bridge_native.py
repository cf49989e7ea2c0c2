"""The documented native bodies as messages of the contract, and back."""

import pytest

from mlxgui.v1 import common_pb2, inference_pb2, model_pb2
from rest_bridge import native, pages
from rest_bridge.errors import ApiError
from rest_bridge.message_json import GIB, gigabytes, message_json


def _model() -> model_pb2.Model:
    model = model_pb2.Model(
        id=1,
        name="llama",
        path="/path/to/model",
        version="1.0",
        type=model_pb2.MODEL_TYPE_TEXT,
        state=model_pb2.MODEL_STATE_LOADED,
        memory_required_bytes=8 * GIB,
        use_count=15,
    )
    model.create_time.FromJsonString("2025-01-04T09:00:00.750Z")
    model.last_use_time.FromJsonString("2025-01-04T10:30:00Z")
    model.update_time.FromJsonString("2025-01-04T10:30:00Z")
    return model


def test_a_model_has_the_documented_keys_and_values() -> None:
    """Key by key what the document shows for GET /v1/models/{name}."""
    documented = {
        "id": 1,
        "name": "llama",
        "path": "/path/to/model",
        "version": "1.0",
        "type": "text",
        "status": "loaded",
        "memory_required_gb": 8,
        "use_count": 15,
        "last_used_at": "2025-01-04T10:30:00",
        "created_at": "2025-01-04T09:00:00",
        "updated_at": "2025-01-04T10:30:00",
        "error_message": None,
        "metadata": {},
    }
    body = native.model_json(_model())
    assert {key: body[key] for key in documented} == documented
    assert (body["object"], body["owned_by"], body["root"]) == ("model", "mlx-gui", "llama")
    assert body["created"] == 1735981200


def test_the_list_is_both_documented_bodies() -> None:
    """OpenAI's clients read `data`, the document's `models`."""
    body = native.model_list([_model()])
    assert body["object"] == "list"
    assert body["data"][0]["id"] == "llama"
    assert body["models"][0]["id"] == 1


def test_what_is_unset_is_null() -> None:
    """Never used, never failed, unknown: null, and neither zero nor empty."""
    body = message_json(model_pb2.Model(name="m"))
    assert [body[key] for key in ("last_used_at", "error_message", "status", "author", "pooling")] == [
        None
    ] * 5
    assert body["capabilities"] == []


@pytest.mark.parametrize(
    ("size_bytes", "size_gb"),
    [(0, 0.0), (3_674_112, 0.003422), (8 * GIB, 8.0), (9_126_805_504, 8.5)],
)
def test_gigabytes_show_small_models_too(size_bytes: int, size_gb: float) -> None:
    """Four significant digits; a model of a few MB is not 0.0."""
    assert gigabytes(size_bytes) == size_gb


def test_generate_takes_the_documented_body() -> None:
    """Null is the documented default of the seed. The model has to be loaded already."""
    request = native.generate_request(
        "m",
        {
            "prompt": "Once",
            "max_tokens": 100,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "repetition_context_size": 20,
            "seed": None,
        },
    )
    assert request.prompts[0].text == "Once"
    assert request.load_policy == common_pb2.LOAD_POLICY_REQUIRE_LOADED
    assert request.sampling.HasField("top_k") and not request.sampling.HasField("seed")


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": "x", "tempreature": 1}, "tempreature")],
)
def test_generate_refuses_by_name(body: dict[str, object], param: str) -> None:
    """A misspelt field is not passed over."""
    with pytest.raises(ApiError) as caught:
        native.generate_request("m", body)
    assert caught.value.param == param


def test_generate_answers_as_documented() -> None:
    """The rate is tokens by seconds, as in the document's example."""
    request = native.generate_request("m", {"prompt": "Once"})
    response = inference_pb2.GenerateResponse(model="m")
    response.choices.add(text=" upon", finish_reason=common_pb2.FINISH_REASON_STOP)
    response.usage.CopyFrom(
        common_pb2.Usage(prompt_token_count=4, completion_token_count=96, total_token_count=100)
    )
    response.timing.total.FromMilliseconds(4000)
    response.timing.load.FromMilliseconds(1000)
    response.timing.queue.FromMilliseconds(500)
    body = native.generated(response, request)
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 96, "total_tokens": 100}
    assert body["timing"] == {"generation_time_seconds": 2.5, "tokens_per_second": 38.4}
    assert (body["model"], body["prompt"], body["text"]) == ("m", "Once", " upon")


def test_install_wants_one_source() -> None:
    """A hub id or a directory."""
    assert native.install_request({"model_id": "a/b", "name": "n", "revision": "r"}).model_id == "a/b"
    assert native.install_request({"path": "/models/x"}).local_directory == "/models/x"
    for body, param in (
        ({}, "model_id"),
        ({"model_id": "a/b", "path": "/x"}, "path"),
        ({"model": "a/b"}, "model"),
    ):
        with pytest.raises(ApiError) as caught:
            native.install_request(body)
        assert caught.value.param == param


def test_install_and_load_answer_as_documented() -> None:
    """The document's sentences, word by word."""
    operation = model_pb2.Operation(success=model_pb2.Model(name="qwen", huggingface_id="a/Qwen"), done=True)
    assert native.installed(operation, model_pb2.InstallModelRequest(model_id="a/Qwen")) == {
        "message": "Model 'qwen' installed successfully",
        "model_name": "qwen",
        "model_id": "a/Qwen",
        "status": "installed",
    }
    assert native.loaded(operation) == {"message": "Model 'qwen' loaded successfully", "status": "loaded"}
    operation.load.memory_warning = "It takes 90 %."
    assert native.loaded(operation)["memory_warning"] == "It takes 90 %."
    assert native.unloaded(operation.success) == {
        "message": "Model 'qwen' unloaded successfully",
        "status": "unloaded",
    }


def test_an_update_says_whether_there_was_a_newer_revision() -> None:
    """By the revision before and after."""
    model = model_pb2.Model(name="qwen", huggingface_id="a/Qwen", revision="b" * 40)
    operation = model_pb2.Operation(success=model, done=True, warnings=["It is loaded."])
    assert native.updated(operation, "a" * 40) == {
        "message": "Model 'qwen' updated successfully",
        "model_name": "qwen",
        "model_id": "a/Qwen",
        "revision": "b" * 40,
        "status": "updated",
        "warnings": ["It is loaded."],
    }
    body = native.updated(operation, "b" * 40)
    assert (body["message"], body["status"]) == ("Model 'qwen' is up to date", "up_to_date")


def test_pinning_and_unpinning_answer_alike() -> None:
    """In the manner of load and unload."""
    for is_pinned, word in ((True, "pinned"), (False, "unpinned")):
        assert native.pinned(model_pb2.Model(name="m", pinned=is_pinned)) == {
            "message": f"Model 'm' {word} successfully",
            "pinned": is_pinned,
            "status": word,
        }


def test_delete_says_why_files_stayed() -> None:
    """The documented keys first."""
    body = native.deleted(
        model_pb2.DeleteModelResponse(name="m", removed_files=False, kept_reason="They are yours.")
    )
    assert body == {
        "message": "Model 'm' deleted successfully",
        "removed_files": False,
        "status": "deleted",
        "reason": "They are yours.",
    }


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        (model_pb2.Operation(), "running"),
        (model_pb2.Operation(done=True, success=model_pb2.Model()), "succeeded"),
        (model_pb2.Operation(done=True, error=common_pb2.OperationError(code=13)), "failed"),
        (
            model_pb2.Operation(
                done=True, error=common_pb2.OperationError(code=1, reason=common_pb2.ERROR_REASON_CANCELLED)
            ),
            "cancelled",
        ),
    ],
)
def test_an_operation_says_how_it_is(operation: model_pb2.Operation, status: str) -> None:
    """One word for what is spread over three fields."""
    assert native.operation_json(operation)["status"] == status


def test_progress_is_exact_bytes() -> None:
    """A download's progress bar needs more than four digits."""
    operation = model_pb2.Operation(id="o", kind=model_pb2.Operation.KIND_INSTALL)
    operation.install.CopyFrom(
        model_pb2.InstallProgress(
            phase=model_pb2.InstallProgress.PHASE_DOWNLOADING, done_bytes=123456789, total_bytes=987654321
        )
    )
    operation.install.remaining.FromMilliseconds(1500)
    body = native.operation_json(operation)
    assert body["kind"] == "install"
    assert body["progress"]["phase"] == "downloading"
    assert (body["progress"]["done_bytes"], body["progress"]["remaining_seconds"]) == (123456789, 1.5)


def test_the_pages_escape_what_they_show() -> None:
    """The README's headings become links and ids, its text is shown as it is; code is no heading."""
    readme = "# Title\nWords <b>.\n## First steps\n```\n# a comment\n```\n"
    page = pages.documentation(readme, "<h2>Routes</h2>")
    assert '<h2 id="first-steps">First steps</h2>' in page and page.endswith("<h2>Routes</h2></body></html>")
    assert "&lt;b&gt;" in page and "# a comment" in page
    assert '<a href="/docs#first-steps">' in pages.front_page("1", "running", readme)
