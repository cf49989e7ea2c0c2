"""Vision models behind the whole server: pictures in a chat, streamed and not, beside text; what GetModel says."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxgui.v1 import common_pb2, inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc
from tests.conftest import RestSession
from tests.support_calls import CALL_SECONDS, fails, last_operation, sampling, streamed_text, text_of
from tests.support_images import png
from tests.support_models import build_tiny
from tests.support_vision import build_tiny_vision, picture

Stub = inference_pb2_grpc.InferenceServiceStub
Models = model_pb2_grpc.ModelServiceStub
Part = inference_pb2.ContentPart
GREEDY = {"max_tokens": 12, "temperature": 0.0}


def file_of(seed: int, width: int = 64, height: int = 48) -> bytes:
    """A PNG of noise."""
    pixels = picture(seed, width, height).pixels
    rows = (pixels[at : at + 3 * width] for at in range(0, len(pixels), 3 * width))
    return png(width, height, b"".join(b"\0" + row for row in rows))


FIRST, SECOND = file_of(1), file_of(2, 48, 90)


def turn(
    *parts: str | bytes, role: "inference_pb2.Role.ValueType" = inference_pb2.ROLE_USER
) -> inference_pb2.ChatMessage:
    content = [
        Part(text=part) if isinstance(part, str) else Part(image=inference_pb2.Image(data=part))
        for part in parts
    ]
    return inference_pb2.ChatMessage(role=role, content=content)


def ask(model: str, *messages: inference_pb2.ChatMessage) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(model=model, messages=messages, sampling=sampling(**GREEDY))


@contextmanager
def installed(models: Models, folder: Path) -> Iterator[str]:
    """The folder's model, in the registry under the folder's name."""
    request = model_pb2.InstallModelRequest(local_directory=str(folder), name=folder.name)
    assert not last_operation(models.InstallModel(request)).HasField("error")
    try:
        yield folder.name
    finally:
        models.UnloadModel(model_pb2.UnloadModelRequest(name=folder.name, force=True))
        models.DeleteModel(model_pb2.DeleteModelRequest(name=folder.name))


@pytest.fixture(scope="module")
def seeing(local_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = build_tiny_vision(tmp_path_factory.mktemp("vision") / "tiny-qwen3-vl", "qwen3_vl")
    with installed(local_models, folder) as name:
        yield name


def test_pictures_are_seen_in_order_and_across_turns(inference: Stub, seeing: str) -> None:
    """Streaming and not; each picture's tokens are counted; text alone is answered too."""
    yes = turn("yes", role=inference_pb2.ROLE_ASSISTANT)
    requests = [
        ask(seeing, turn("what is this")),
        ask(seeing, turn(FIRST, "what is this")),
        ask(seeing, turn(FIRST, "compare with", SECOND)),
        ask(seeing, turn(SECOND, "compare with", FIRST)),
        ask(seeing, turn(FIRST, "what is this"), yes, turn("and this", SECOND)),
    ]
    calls = [inference.Chat.future(request, timeout=CALL_SECONDS) for request in requests]
    streams = [
        inference.ChatStream(inference_pb2.ChatStreamRequest(request=request), timeout=CALL_SECONDS)
        for request in requests
    ]
    replies = [call.result() for call in calls]
    texts = [text_of(reply) for reply in replies]
    assert texts == [streamed_text(stream) for stream in streams] and all(texts)
    assert len(set(texts)) == len(texts)
    tokens = [reply.usage.prompt_token_count for reply in replies]
    assert tokens[0] < tokens[1] < tokens[2] == tokens[3] < tokens[4]
    counted = inference.CountTokens(inference_pb2.CountTokensRequest(chat=requests[4]), timeout=CALL_SECONDS)
    assert counted.token_count == tokens[4]
    assert not any(reply.warnings for reply in replies)


def test_get_model_says_what_it_takes(inference: Stub, models: Models, seeing: str) -> None:
    inference.Chat(ask(seeing, turn("hello")), timeout=CALL_SECONDS)
    model = models.GetModel(model_pb2.GetModelRequest(name=seeing)).model
    assert model.type == model_pb2.MODEL_TYPE_VISION and not model.notes
    assert set(model.capabilities) >= {
        model_pb2.CAPABILITY_COMPLETION,
        model_pb2.CAPABILITY_CHAT,
        model_pb2.CAPABILITY_IMAGE_INPUT,
        model_pb2.CAPABILITY_BATCHING,
    }


def test_image_tokens_as_text_fail_and_the_worker_lives_on(inference: Stub, seeing: str) -> None:
    failure = fails(
        lambda: inference.Chat(
            ask(seeing, turn(FIRST, "<|vision_start|><|image_pad|>")), timeout=CALL_SECONDS
        )
    )
    assert failure.reason == "INVALID_PARAMETER" and failure.fields == ["messages"]
    assert text_of(inference.Chat(ask(seeing, turn(FIRST, "again")), timeout=CALL_SECONDS))


def test_all_but_the_inputs_is_as_for_text(inference: Stub, seeing: str) -> None:
    """Choices, a constraint and log-probabilities of a chat with a picture."""
    request = ask(seeing, turn(FIRST, "what is this"))
    request.sampling.MergeFrom(sampling(temperature=1.5, n=3, regex="[a-f]{6}", top_logprobs=2, seed=5))
    reply = inference.Chat(request, timeout=CALL_SECONDS)
    texts = [text_of(reply, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert all(re.fullmatch("[a-f]{6}", text) for text in texts)
    assert all(choice.finish_reason == common_pb2.FINISH_REASON_STOP for choice in reply.choices)
    for choice in reply.choices:
        assert choice.logprobs and all(len(each.top) == 2 for each in choice.logprobs)


def test_rest_takes_data_urls_and_streams(http: RestSession, inference: Stub, seeing: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(FIRST).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this"}]
    body = {"model": seeing, "messages": [{"role": "user", "content": content}], **GREEDY}
    reply = http.post("/v1/chat/completions", json=body).json()
    text = reply["choices"][0]["message"]["content"]
    assert text == text_of(inference.Chat(ask(seeing, turn(FIRST, "what is this")), timeout=CALL_SECONDS))
    lines = http.post("/v1/chat/completions", json={**body, "stream": True}, stream=True).iter_lines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


def test_what_mlx_vlm_cannot_load_answers_text_with_a_warning(
    inference: Stub, local_models: Models, tmp_path: Path
) -> None:
    """mlx-lm serves what it knows of it; GetModel says so, and offers no images any more."""
    folder = build_tiny(tmp_path / "tiny-half", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"hidden_size": 8}}))
    with installed(local_models, folder) as name:
        reply = inference.Chat(ask(name, turn(FIRST, "hello")), timeout=CALL_SECONDS)
        plain = inference.Chat(ask(name, turn("hello")), timeout=CALL_SECONDS)
        assert text_of(reply) == text_of(plain) != ""
        assert any("mlx-vlm cannot load this checkpoint" in warning for warning in reply.warnings)
        told = [
            any(warning.startswith("images were left out") for warning in each.warnings)
            for each in (reply, plain)
        ]
        assert told == [True, False]
        model = local_models.GetModel(model_pb2.GetModelRequest(name=name)).model
        assert model.notes and model_pb2.CAPABILITY_IMAGE_INPUT not in model.capabilities
