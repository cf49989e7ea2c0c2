"""OpenAI's requests and answers as messages of the contract, and back."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge import embeddings, openai, rerank, responses, sse
from rest_bridge.errors import ApiError

USER = {"role": "user", "content": "hi"}


def _chat(**more: Any) -> tuple[inference_pb2.ChatRequest, openai.Options]:
    return openai.chat_request({"model": "demo", "messages": [USER], **more})


def _refusal(**more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        _chat(**more)
    return caught.value


def test_a_plain_chat_sets_nothing_that_was_not_sent() -> None:
    """Absence is the server's to interpret."""
    request, options = _chat()
    assert not request.sampling.ListFields()
    assert request.messages[0].content[0].text == "hi"
    assert (options.stream, options.include_usage, options.warnings) == (False, False, [])


def test_sampling_fields_reach_the_server() -> None:
    """Zero is a value, not an absence."""
    request, _ = _chat(
        temperature=0, top_p=0.5, top_k=40, min_p=0.1, seed=-5, n=2, stop="a", max_tokens=7, frequency_penalty=1,
        presence_penalty=-1, repetition_penalty=1.1, logit_bias={"5": -100}, keep_alive="5m", priority=3,
    )  # fmt: skip
    sampling = request.sampling
    assert sampling.HasField("temperature") and sampling.temperature == 0
    assert (sampling.top_k, sampling.seed, sampling.n, list(sampling.stop)) == (40, -5, 2, ["a"])
    assert dict(sampling.logit_bias) == {5: -100}
    assert (request.priority, request.keep_alive.seconds) == (3, 300)


def test_a_request_need_not_name_a_model() -> None:
    """Which one is meant, or that none is, is the server's to say."""
    for body in ({}, {"model": None}, {"model": ""}):
        request, options = openai.chat_request({"messages": [USER], **body})
        assert (request.model, options.model) == ("", "")
        assert openai.completion_request({"prompt": "x", **body})[0].model == ""


def test_stop_is_a_text_or_a_list() -> None:
    """Both forms of OpenAI's field."""
    assert list(_chat(stop=["a", "b"])[0].sampling.stop) == ["a", "b"]
    assert _refusal(stop=5).param == "stop"
    assert _refusal(stop=["a", 5]).param == "stop[1]"


def test_errors_name_the_field_as_the_caller_wrote_it() -> None:
    """The contract has other names for some."""
    _, options = _chat(max_completion_tokens=5)
    assert options.param("request.sampling.max_tokens") == "max_completion_tokens"
    assert options.param("sampling.json_schema") == "response_format"
    for source in ("data", "url"):
        path = f"messages[3].content[0].image.{source}"
        error = ApiError("INVALID_IMAGE", f"{path} cannot be read", path)
        options.rename(error)
        assert error.param == "messages[3].content[0].image_url.url"
        assert error.message == f"{error.param} cannot be read"
    assert options.param(None) is None
    _, options = openai.completion_request({"model": "demo", "prompt": "x", "logprobs": 1})
    assert options.param("prompts[0]") == "prompt"
    assert options.param("sampling.top_logprobs") == "logprobs"
    _, options = openai.completion_request({"model": "demo", "prompt": ["x", "y"]})
    assert options.param("prompts[1].text") == "prompt[1].text"


def test_max_tokens_under_both_names() -> None:
    """Two different values would make one of them a lie."""
    assert _chat(max_tokens=5, max_completion_tokens=5)[0].sampling.max_tokens == 5
    assert _refusal(max_tokens=5, max_completion_tokens=6).param == "max_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("max_tokens", 1.5),
        ("max_tokens", 2**31),
        ("seed", 2**63),
        ("n", "2"),
        ("stream", 1),
        ("logit_bias", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"99999999999": 1}),
        ("messages", None),
        ("messages", []),
        ("messages", "hi"),
        ("model", 5),
        ("model", ["demo"]),
        ("stream_options", {"include_usage": True}),
        ("top_logprobs", 5),
        ("tool_choice", "maybe"),
        ("tool_choice", {"type": "function"}),
        ("keep_alive", "soon"),
        ("modalities", ["text", "audio"]),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    """Wrong types and values are a 400 with OpenAI's `param`."""
    error = _refusal(**{field: value})
    assert error.http_status == 400
    assert error.param is not None and error.param.split(".")[0] == field
    assert f"`{field}" in error.message


@pytest.mark.parametrize("field", ["audio", "web_search_options", "functions", "function_call", "prediction"])
def test_fields_that_would_make_the_answer_wrong_are_refused(field: str) -> None:
    """By name, and with the way out."""
    assert _refusal(**{field: {"x": 1}}).param == field


def test_fields_without_effect_are_reported() -> None:
    """Accepted, because clients send them, but not in silence; null is not sent."""
    _, options = _chat(store=True, metadata={"a": "b"}, service_tier=None, my_field=1)
    assert options.warnings == [
        "`store` has no effect: answers are not stored.",
        "`metadata` has no effect: answers are not stored.",
        "`my_field` is unknown and has no effect.",
    ]


def test_unknown_fields_are_reported_at_any_depth() -> None:
    """By their path; schemas and arguments are the caller's own, whatever they hold."""
    function = {"name": "f", "parameters": {"type": "object", "x": 1}, "surprise": 1}
    image = {"url": "https://pictures.test/a.png", "surprise": 1}
    parts = [{"type": "text", "text": "hi", "surprise": 1}, {"type": "image_url", "image_url": image}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", "surprise": 1}}
    _, options = _chat(
        messages=[
            {"role": "user", "content": parts, "surprise": 1},
            {"role": "assistant", "tool_calls": [call]},
        ],
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "f", "surprise": 1}},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}, "surprise": 1},
        },
        chat_template_kwargs={"anything": {"goes": 1}},
        stream=True,
        stream_options={"surprise": 1},
    )
    assert {warning.split("`")[1] for warning in options.warnings} == {
        "messages[0].surprise",
        "messages[0].content[0].surprise",
        "messages[0].content[1].image_url.surprise",
        "messages[1].tool_calls[0].function.surprise",
        "tools[0].function.surprise",
        "tool_choice.function.surprise",
        "response_format.json_schema.surprise",
        "stream_options.surprise",
    }


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "king", "content": "x"}, "messages[0].role"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "assistant"}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        ("hi", "messages[0]"),
    ],
)
def test_a_wrong_message_is_named(message: object, param: str) -> None:
    """Down to the part at fault."""
    assert _refusal(messages=[message]).param == param


def test_messages_of_every_role() -> None:
    """A conversation with tools, as clients send it back."""
    request, options = _chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "Ann",
            },
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "reasoning_content": "hm",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "5", "tool_call_id": "1"},
        ]
    )
    developer, user, assistant, tool = request.messages
    assert developer.role == inference_pb2.ROLE_DEVELOPER
    assert ([part.text for part in user.content], user.name) == (["a", "b"], "Ann")
    assert (assistant.reasoning, assistant.tool_calls[0].name, len(assistant.content)) == ("hm", "f", 0)
    assert tool.tool_call_id == "1"
    assert options.warnings == []


def test_images_come_as_bytes_or_by_url() -> None:
    """Base64 is decoded here: a third less on the way."""
    pixels = base64.b64encode(b"\x89PNG...").decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixels}", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ]
    request, _ = _chat(messages=[{"role": "user", "content": parts}])
    first, second = (part.image for part in request.messages[0].content)
    assert (first.data, first.media_type, first.detail) == (
        b"\x89PNG...",
        "image/png",
        inference_pb2.Image.DETAIL_LOW,
    )
    assert second.url == "https://example.com/a.png"


@pytest.mark.parametrize(
    ("url", "http_status"),
    [
        ("file:///etc/passwd", 400),
        ("data:image/png,abc", 400),
        ("data:image/png;base64,a", 400),
        ("data:image/png;base64,", 400),
        ("data:image/png;base64,==", 400),
        ("data:image/png;base64,????", 400),
        ("data:image/png;base64," + "A" * (28 * 1024 * 1024), 413),
        ("ftp://example.com/a.png", 400),
    ],
)
def test_a_wrong_image_is_named(url: str, http_status: int) -> None:
    """Its size is judged before it is decoded."""
    error = _refusal(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    )
    assert (error.http_status, error.param) == (http_status, "messages[0].content[0].image_url.url")


def test_tools_keep_their_json_as_it_is() -> None:
    """Key order and large integers reach the prompt."""
    parameters = {"type": "object", "properties": {"z": {"const": 9007199254740993}, "a": {}}}
    request, _ = _chat(
        tools=[{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        parallel_tool_calls=False,
    )
    schema = request.tools[0].parameters_schema
    assert json.loads(schema) == parameters
    assert schema.index('"z"') < schema.index('"a"') and "9007199254740993" in schema
    assert request.tool_choice.function == "f"
    assert request.HasField("parallel_tool_calls") and not request.parallel_tool_calls


def test_response_formats() -> None:
    """Text asks for nothing; the schema goes on as text."""
    assert _chat(response_format={"type": "text"})[0].sampling.WhichOneof("constraint") is None
    assert _chat(response_format={"type": "json_object"})[0].sampling.json_object
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    assert _chat(response_format=schema)[0].sampling.json_schema == '{"type":"object"}'
    assert _refusal(response_format={"type": "xml"}).param == "response_format.type"
    assert _refusal(response_format={"type": "json_schema"}).param == "response_format.json_schema"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_in_all_four_forms(prompt: object, expected: list[object]) -> None:
    """Texts or token ids, one or several."""
    request, _ = openai.completion_request({"model": "demo", "prompt": prompt})
    got = [item.text if item.HasField("text") else list(item.token_ids.ids) for item in request.prompts]
    assert got == expected


@pytest.mark.parametrize("prompt", [None, [], [[]], ["a", 1], [1, "a"], [[1], "a"], 5, {}, [True], [2**31]])
def test_a_wrong_prompt_is_refused(prompt: object) -> None:
    """Mixed and empty lists too."""
    with pytest.raises(ApiError) as caught:
        openai.completion_request({"model": "demo", "prompt": prompt})
    assert (caught.value.param or "").startswith("prompt")


def test_completions_refuse_what_would_be_wrong() -> None:
    """One choice out of one is what it would be anyway."""
    openai.completion_request({"model": "demo", "prompt": "x", "best_of": 1, "suffix": ""})
    for field, value in (("best_of", 3), ("suffix", "end")):
        with pytest.raises(ApiError) as caught:
            openai.completion_request({"model": "demo", "prompt": "x", field: value})
        assert caught.value.param == field


# --- Answers


def _start(**more: Any) -> inference_pb2.StreamStart:
    start = inference_pb2.StreamStart(id="abc", model="demo", **more)
    start.create_time.FromSeconds(1751234567)
    return start


def _events(replies: list[inference_pb2.ChatStreamResponse], options: openai.Options) -> list[dict[str, Any]]:
    raw = b"".join(openai.chat_events(replies, options, "fp"))
    return [json.loads(event.removeprefix("data: ")) for event in raw.decode().split("\n\n") if event]


def _delta(text: str, index: int = 0) -> inference_pb2.ChatStreamResponse:
    return inference_pb2.ChatStreamResponse(
        delta=inference_pb2.ChatDelta(index=index, text=text, token_count=1)
    )


def _finish(index: int = 0) -> inference_pb2.ChatStreamResponse:
    finish = inference_pb2.StreamFinish(index=index, finish_reason=common_pb2.FINISH_REASON_STOP)
    return inference_pb2.ChatStreamResponse(finish=finish)


USAGE = common_pb2.Usage(
    prompt_token_count=3, completion_token_count=2, total_token_count=5, cached_prompt_token_count=1
)


def test_a_stream_is_role_text_finish() -> None:
    """The document's chunks, in the document's form."""
    replies = [
        inference_pb2.ChatStreamResponse(start=_start()),
        inference_pb2.ChatStreamResponse(prefill=inference_pb2.PrefillProgress(total_token_count=9)),
        _delta("1"),
        _finish(),
        inference_pb2.ChatStreamResponse(end=inference_pb2.StreamEnd(usage=USAGE)),
    ]
    role, text, finish = _events(replies, openai.Options("demo"))
    assert role == {
        "id": "chatcmpl-abc",
        "object": "chat.completion.chunk",
        "created": 1751234567,
        "model": "demo",
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}],
    }
    assert text["choices"] == [{"index": 0, "delta": {"content": "1"}, "finish_reason": None}]
    assert text["id"] == role["id"]
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]


def test_usage_comes_last_when_asked_for() -> None:
    """And every other chunk then says null, as OpenAI's do."""
    replies = [
        inference_pb2.ChatStreamResponse(start=_start()),
        _delta("1"),
        _finish(),
        inference_pb2.ChatStreamResponse(end=inference_pb2.StreamEnd(usage=USAGE)),
    ]
    *chunks, last = _events(replies, openai.Options("demo", stream=True, include_usage=True))
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize(
    "text", ['"', "\\", "\n\n", "\r", "data: [DONE]\n\n", "\0", "  ", "日本", "🦙", "\u0000", "</script>"]
)
def test_any_text_survives_the_stream(text: str) -> None:
    """No character of a reply can end or break an event."""
    replies = [inference_pb2.ChatStreamResponse(start=_start()), _delta(text)]
    for options in (openai.Options("demo"), openai.Options('mo"del\0', include_usage=True)):
        assert _events(replies, options)[-1]["choices"][0]["delta"]["content"] == text


def test_choices_of_a_stream_keep_apart() -> None:
    """Each has its role, its text and its end."""
    replies = [
        inference_pb2.ChatStreamResponse(start=_start()),
        _delta("b", 1),
        _delta("a", 0),
        _finish(1),
        _delta("aa", 0),
        _finish(0),
        inference_pb2.ChatStreamResponse(end=inference_pb2.StreamEnd(usage=USAGE)),
    ]
    choices = [chunk["choices"][0] for chunk in _events(replies, openai.Options("demo", choice_count=2))]
    assert [choice["index"] for choice in choices] == [0, 1, 1, 0, 1, 0, 0]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop", None, "stop"]


def test_warnings_come_with_the_first_chunk_and_with_the_last_finish() -> None:
    """Those of the end too, although it has no chunk of its own."""
    replies = [
        inference_pb2.ChatStreamResponse(start=_start()),
        _finish(),
        inference_pb2.ChatStreamResponse(end=inference_pb2.StreamEnd(usage=USAGE, warnings=["Late."])),
    ]
    first, last = _events(replies, openai.Options("demo", warnings=["Early."]))
    assert first["warnings"] == ["Early."]
    assert (last["choices"][0]["finish_reason"], last["warnings"]) == ("stop", ["Late."])


def test_a_finish_is_not_lost_when_the_stream_fails_after_it() -> None:
    """It is held back for the end; a failure in place of the end lets it go."""

    def replies() -> Iterator[inference_pb2.ChatStreamResponse]:
        yield inference_pb2.ChatStreamResponse(start=_start())
        yield _finish()
        raise ApiError("ENGINE_DEAD", "It died.")

    events = openai.chat_events(replies(), openai.Options("demo"), "fp")
    assert b"assistant" in next(events)
    assert b'"finish_reason":"stop"' in next(events)
    with pytest.raises(ApiError):
        next(events)


def test_reasoning_and_tool_calls_stream_too() -> None:
    """In the fields that clients look for."""
    delta = inference_pb2.ChatDelta(reasoning="hm")
    delta.tool_calls.add(index=0, id="c1", name="f", arguments="{")
    more = inference_pb2.ChatDelta()
    more.tool_calls.add(index=0, arguments="}")
    replies = [
        inference_pb2.ChatStreamResponse(start=_start()),
        inference_pb2.ChatStreamResponse(delta=delta),
        inference_pb2.ChatStreamResponse(delta=more),
        inference_pb2.ChatStreamResponse(delta=inference_pb2.ChatDelta()),
    ]
    _, first, second = (chunk["choices"][0]["delta"] for chunk in _events(replies, openai.Options("demo")))
    assert first == {
        "reasoning_content": "hm",
        "reasoning": "hm",
        "tool_calls": [
            {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}
        ],
    }
    assert second == {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}


def test_a_whole_chat_answer() -> None:
    """The document's body with OpenAI's further fields."""
    response = inference_pb2.ChatResponse(id="abc", model="demo", usage=USAGE, warnings=["From the server."])
    response.create_time.FromSeconds(7)
    choice = response.choices.add(finish_reason=common_pb2.FINISH_REASON_LENGTH, stop_sequence="x")
    choice.message.role = inference_pb2.ROLE_ASSISTANT
    choice.message.content.add(text="Hello")
    body = openai.chat_completion(response, openai.Options("demo", warnings=["From here."]), "fp")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": "x",
        }
    ]
    assert (body["id"], body["object"], body["created"]) == ("chatcmpl-abc", "chat.completion", 7)
    assert body["warnings"] == ["From here.", "From the server."]


def test_a_reply_that_only_calls_tools_has_no_content() -> None:
    """null and not an empty text, which clients would show."""
    response = inference_pb2.ChatResponse(id="abc")
    response.choices.add().message.tool_calls.add(id="c", name="f", arguments="{}")
    message = openai.chat_completion(response, openai.Options("demo"), "fp")["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_log_probabilities_in_both_forms() -> None:
    """Chat lists tokens, completions list columns with offsets into the text."""
    entries = [
        common_pb2.TokenLogprob(text="Hi", bytes=b"Hi"),
        common_pb2.TokenLogprob(
            text="!", logprob=-0.5, bytes=b"!", top=[common_pb2.TokenLogprob(text="?", logprob=-2)]
        ),
    ]
    second = openai.chat_logprobs(entries)["content"][1]
    assert (second["token"], second["logprob"], second["bytes"]) == ("!", -0.5, [33])
    assert second["top_logprobs"] == [{"token": "?", "logprob": -2.0, "bytes": []}]
    columns, offset = openai.text_logprobs(entries, 10)
    assert columns == {
        "tokens": ["Hi", "!"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"?": -2.0, "!": -0.5}],
        "text_offset": [10, 12],
    }
    assert offset == 13


def test_a_streamed_continuation() -> None:
    """Completions have neither role nor delta."""
    replies = [
        inference_pb2.GenerateStreamResponse(start=_start()),
        inference_pb2.GenerateStreamResponse(delta=inference_pb2.TextDelta(text="on")),
        inference_pb2.GenerateStreamResponse(
            finish=inference_pb2.StreamFinish(finish_reason=common_pb2.FINISH_REASON_LENGTH)
        ),
        inference_pb2.GenerateStreamResponse(end=inference_pb2.StreamEnd(usage=USAGE)),
    ]
    raw = b"".join(openai.completion_events(replies, openai.Options("demo"), "fp")).decode()
    chunks = [json.loads(data) for data in re.findall(r"data: (.*)\n\n", raw)]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["on", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("include_usage", [False, True])
def test_warnings_of_a_continuation_come_with_its_finish(include_usage: bool) -> None:
    """Also those of the stream's end, whether or not usage was asked for."""
    replies = [
        inference_pb2.GenerateStreamResponse(start=_start()),
        inference_pb2.GenerateStreamResponse(
            finish=inference_pb2.StreamFinish(finish_reason=common_pb2.FINISH_REASON_LENGTH)
        ),
        inference_pb2.GenerateStreamResponse(end=inference_pb2.StreamEnd(usage=USAGE, warnings=["Late."])),
    ]
    options = openai.Options("demo", include_usage=include_usage, warnings=["Early."])
    raw = b"".join(openai.completion_events(replies, options, "fp")).decode()
    finish, *rest = [json.loads(data) for data in re.findall(r"data: (.*)\n\n", raw)]
    assert (finish["choices"][0]["finish_reason"], finish["warnings"]) == ("length", ["Early.", "Late."])
    assert [bool(chunk["usage"]) for chunk in rest] == [True] * include_usage


def test_embeddings_as_numbers_or_base64() -> None:
    """Base64 is the server's bytes, untouched."""
    request, options = embeddings.embedding_request(
        {"model": "e", "input": ["a", "b"], "encoding_format": "base64"}
    )
    assert (len(request.inputs), request.encoding) == (2, inference_pb2.EMBEDDING_ENCODING_FLOAT32_LE)
    response = inference_pb2.EmbedResponse(model="e")
    response.embeddings.add(index=0, float32_le=b"\0\0\x80?")
    response.embeddings.add(index=1).floats.values.append(1.0)
    data = embeddings.embeddings(response, options)["data"]
    assert [entry["embedding"] for entry in data] == ["AACAPw==", [1.0]]


def test_a_user_s_name_is_sent_and_reported_by_every_route() -> None:
    """With the same words."""
    for request, options in (
        _chat(user="u"),
        openai.completion_request({"prompt": "x", "user": "u"}),
        embeddings.embedding_request({"input": "x", "user": "u"}),
        rerank.rerank_request({"query": "x", "documents": ["y"], "user": "u"}),
        responses.response_request({"input": "x", "user": "u"}),
    ):
        assert request.user == "u"
        assert options.warnings == ["`user` has no effect: it only reaches the log."]


def test_an_error_in_a_stream_is_an_event() -> None:
    """With the object that OpenAI's SDK raises on."""
    event = sse.error_event(ApiError("ENGINE_DEAD", "It\ndied."))
    assert event.endswith(b"\n\n") and event.count(b"\n") == 2
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "engine_dead"
