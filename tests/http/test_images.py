"""Images in a chat, from the client to the model: what reaches it, what is left out and what is refused."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxgui.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from tests.conftest import RestSession
from tests.picture_host import PictureHost
from tests.support_calls import CALL_SECONDS, last_operation
from tests.support_http import openai_error
from tests.support_images import png
from tests.support_vision import build_tiny_vision

CHAT = "/v1/chat/completions"
EYES = "tiny-eyes"
QUESTION = "What is the capital of France?"
PLACE = "messages[0].content[1].image_url.url"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def eyes(
    local_models: model_pb2_grpc.ModelServiceStub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A tiny vision model on the session's server; refusals do not load it."""
    folder: Path = build_tiny_vision(tmp_path_factory.mktemp("vision") / EYES, "qwen2_vl")
    install = model_pb2.InstallModelRequest(local_directory=str(folder), name=EYES)
    assert last_operation(local_models.InstallModel(install)).success.name == EYES
    yield EYES
    local_models.DeleteModel(model_pb2.DeleteModelRequest(name=EYES, force=True), timeout=CALL_SECONDS)


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(http: RestSession, model: str, *urls: str, **more: Any) -> Any:
    parts: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 8, **more}
    return http.post(CHAT, json=body)


def test_a_text_model_leaves_images_out_and_says_so(http: RestSession) -> None:
    """In the answer and in a header, streamed or not; no URL is fetched and no bytes are looked at."""
    words = "images were left out: 'demo' is a text model"
    plain = ask(http, "demo").json()
    for url in (data_url(b"no image"), "http://127.0.0.1:9/", data_url(png())):
        response = ask(http, "demo", url)
        answer = response.json()
        assert words in answer["warnings"] and words in response.headers["X-MLXGUI-Warnings"]
        assert answer["choices"] == plain["choices"] and answer["usage"] == plain["usage"]
    streamed = ask(http, "demo", data_url(png()), stream=True)
    assert words in streamed.headers["X-MLXGUI-Warnings"]


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        (
            "http://127.0.0.1:{port}/",
            "url_blocked",
            "is not fetched: only http and https URLs of public hosts",
        ),
        ("http://127.0.0.1:{allowed}/", "url_blocked", "is not fetched"),
        ("https://localhost/", "url_blocked", "is not fetched"),
        ("http://169.254.169.254/latest/meta-data/", "url_blocked", "is not fetched"),
        (data_url(b"no image"), "invalid_image", "cannot be read: it is none of PNG, JPEG, GIF and WebP"),
        (data_url(png()[:-20]), "invalid_image", "cannot be read: it is cut short or damaged"),
        (data_url(png(60_000, 60_000, b"\0")), "invalid_image", "it is 60000 x 60000 pixels large"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "invalid_image", "it is none of PNG"),
        ("data:image/png;base64,", "invalid_image", "0 bytes"),
    ],
    ids=[
        "our own port",
        "our own address",
        "localhost",
        "metadata",
        "text",
        "cut short",
        "bomb",
        "svg",
        "no bytes",
    ],
)
def test_an_image_that_cannot_be_had_is_refused_by_name(
    http: RestSession, eyes: str, picture_host: PictureHost, url: str, code: str, words: str
) -> None:
    port = http.base_url.rpartition(":")[2]
    url = url.replace("{port}", port).replace("{allowed}", str(picture_host.port))
    error = openai_error(ask(http, eyes, url), 400)
    assert (error["code"], error["param"]) == (code, PLACE)
    assert words in error["message"] and PLACE in error["message"]


def test_the_setting_says_what_is_fetched_from_the_next_request_on(http: RestSession, eyes: str) -> None:
    setting, url = "/v1/settings/image_url_fetch", "https://a.example/a.png"
    assert http.get("/v1/settings").json()["image_url_fetch"] == "on"
    try:
        for value, words in (
            ("off", "the setting image_url_fetch is off"),
            ("B.example", "only public hosts that the setting image_url_fetch lists"),
        ):
            assert http.put(setting, json={"value": value}).status_code == 200
            error = openai_error(ask(http, eyes, url), 400)
            assert error["code"] == "url_blocked" and words in error["message"]
    finally:
        assert http.delete(setting).status_code == 200


def test_a_seventeenth_image_is_refused(http: RestSession, eyes: str) -> None:
    """Of a text model too, which would leave it out."""
    for model in (eyes, "demo"):
        error = openai_error(ask(http, model, *[data_url(png())] * 17), 400)
        assert error["param"] == "messages[0].content[17].image_url.url" and "may have 16" in error["message"]


def test_grpc_takes_bytes_and_urls_and_names_the_field(
    inference: inference_pb2_grpc.InferenceServiceStub, system: system_pb2_grpc.SystemServiceStub, eyes: str
) -> None:
    limits = system.GetServerInfo(system_pb2.GetServerInfoRequest()).limits
    assert (limits.max_image_bytes, limits.max_image_count) == (20 * MIB, 16)
    for image, field, status in (
        (inference_pb2.Image(url="http://10.0.0.1/"), "url", "URL_BLOCKED"),
        (inference_pb2.Image(data=b"no image"), "data", "INVALID_IMAGE"),
        (inference_pb2.Image(data=b""), "data", "INVALID_IMAGE"),
        (inference_pb2.Image(data=bytes(20 * MIB + 1)), "data", "PAYLOAD_TOO_LARGE"),
        (inference_pb2.Image(url="http://a.example/" + "x" * 8192), "url", "PAYLOAD_TOO_LARGE"),
    ):
        message = inference_pb2.ChatMessage(
            role=inference_pb2.ROLE_USER, content=[inference_pb2.ContentPart(image=image)]
        )
        with pytest.raises(grpc.RpcError) as caught:
            inference.Chat(inference_pb2.ChatRequest(model=eyes, messages=[message]), timeout=CALL_SECONDS)
        failure = failure_of(caught.value)
        assert failure == (status, f"messages[0].content[0].image.{field}")


def test_who_wants_a_loaded_model_is_refused_before_anything_is_decoded(
    inference: inference_pb2_grpc.InferenceServiceStub, eyes: str
) -> None:
    image = inference_pb2.Image(data=b"no image")
    request = inference_pb2.ChatRequest(
        model=eyes,
        messages=[
            inference_pb2.ChatMessage(
                role=inference_pb2.ROLE_USER, content=[inference_pb2.ContentPart(image=image)]
            )
        ],
        load_policy=common_pb2.LOAD_POLICY_REQUIRE_LOADED,
    )
    with pytest.raises(grpc.RpcError) as caught:
        inference.Chat(request, timeout=CALL_SECONDS)
    assert failure_of(caught.value)[0] == "MODEL_NOT_LOADED"


def failure_of(error: grpc.RpcError) -> tuple[str, str]:
    from rest_bridge.errors import from_rpc

    found = from_rpc(error)
    return found.reason, str(found.param)


def test_a_vision_model_sees_the_image(http: RestSession, eyes: str) -> None:
    """It takes tokens, and another one is another prompt; one that is too large is made smaller, and that is said."""
    plain = ask(http, eyes).json()["usage"]["prompt_tokens"]
    red = ask(http, eyes, data_url(png(56, 56)))
    assert red.status_code == 200, red.text
    answer = red.json()
    assert answer["usage"]["prompt_tokens"] > plain and "warnings" not in answer
    large = ask(http, eyes, data_url(png(2600, 2000, bytes(326 * 2000), colour=0, depth=1)))
    words = "the image in messages[0].content[1] was made smaller, from 2600 x 2000 to 2335 x 1796 pixels"
    assert large.json()["warnings"] == [words]
