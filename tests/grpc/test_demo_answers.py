"""What the demo model says through the whole gRPC path: meaning, counts and ends."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlxgui.v1 import common_pb2, inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc
from tests.support_calls import (
    CALL_SECONDS,
    chat,
    completion,
    fails,
    message,
    sampling,
    text_of,
    until_first_delta,
)

PROMPTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "demo_prompts.json").read_text(encoding="utf-8")
)
Stub = inference_pb2_grpc.InferenceServiceStub

ROLES = {
    "system": inference_pb2.ROLE_SYSTEM,
    "developer": inference_pb2.ROLE_DEVELOPER,
    "user": inference_pb2.ROLE_USER,
    "assistant": inference_pb2.ROLE_ASSISTANT,
    "tool": inference_pb2.ROLE_TOOL,
}
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
TOOL_CALLS = common_pb2.FINISH_REASON_TOOL_CALLS
CHATS = [prompt for prompt in PROMPTS if "messages" in prompt]
COMPLETIONS = [prompt for prompt in PROMPTS if "prompt" in prompt]


def request_of(prompt: dict[str, Any]) -> inference_pb2.ChatRequest:
    """A row of demo_prompts.json, in the form of OpenAI's API, as our request."""
    request = inference_pb2.ChatRequest(
        model="demo", template_arguments=_text(prompt.get("template_arguments"))
    )
    for given in prompt["messages"]:
        added = request.messages.add(role=ROLES[given["role"]])
        if given.get("content"):
            added.content.add(text=given["content"])
        added.tool_call_id = given.get("tool_call_id", "")
        for call in given.get("tool_calls", []):
            function = call["function"]
            added.tool_calls.add(
                id=call.get("id", ""), name=function["name"], arguments=_text(function["arguments"])
            )
    for tool in prompt.get("tools", []):
        function = tool["function"]
        request.tools.add(
            name=function["name"],
            description=function.get("description", ""),
            parameters_schema=_text(function.get("parameters")),
        )
    return request


def as_written(reply: inference_pb2.ChatResponse) -> str:
    """What the model wrote, its markup put back: none of it is in the fields."""
    said = reply.choices[0].message
    written = text_of(reply) if said.content else ""
    assert not any(
        tag in written + said.reasoning for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    )
    if said.reasoning:
        written = f"<think>\n{said.reasoning}\n</think>\n\n{written}"
    calls = [
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
        for call in said.tool_calls
    ]
    return written + "\n".join(calls)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if value is not None else ""


def test_the_list_of_prompts_is_whole() -> None:
    """Some 200 prompts of every kind; none is skipped below."""
    assert len(CHATS) + len(COMPLETIONS) == len(PROMPTS) >= 200
    assert {"capital", "count", "echo", "json", "tool", "think", "unicode", "raw"} <= {
        p["kind"] for p in PROMPTS
    }


def test_every_demo_prompt_is_answered_exactly(inference: Stub, demo_tokenizer: Any) -> None:
    """Dozens at a time, each gets the text it was trained on, ends by itself, and counts its tokens exactly."""

    def ask(prompt: dict[str, Any]) -> tuple[str, str, int, bool]:
        request = request_of(prompt)
        reply = inference.Chat(request, timeout=CALL_SECONDS)
        counted = inference.CountTokens(
            inference_pb2.CountTokensRequest(model="demo", chat=request), timeout=CALL_SECONDS
        )
        usage, text = reply.usage, as_written(reply)
        # The text's own tokens and the end token; the markup of thinking is one special token each.
        completion_count = len(demo_tokenizer.encode(text, add_special_tokens=False).ids) + 1
        exact = (
            usage.prompt_token_count == counted.token_count
            and usage.total_token_count == usage.prompt_token_count + usage.completion_token_count
            and reply.choices[0].finish_reason == (TOOL_CALLS if "<tool_call>" in text else STOP)
            and (usage.reasoning_token_count > 2) == ("<think>" in text)
            and not reply.choices[0].HasField("stop_sequence")
        )
        return prompt["id"], text, usage.completion_token_count - completion_count, exact

    with ThreadPoolExecutor(48) as pool:
        replies = list(pool.map(ask, CHATS))

    expected = {prompt["id"]: prompt["expect"] for prompt in CHATS}
    assert {id: text for id, text, _, _ in replies} == expected
    assert [id for id, _, _, exact in replies if not exact] == []
    assert {id: surplus for id, _, surplus, _ in replies if surplus} == {}


def test_every_raw_prompt_is_continued_exactly(inference: Stub) -> None:
    """Completions see no chat template; several prompts share one request, and keep their order."""
    request = inference_pb2.GenerateRequest(model="demo", sampling=sampling(max_tokens=256))
    for prompt in COMPLETIONS:
        request.prompts.add(text=prompt["prompt"])

    reply = inference.Generate(request, timeout=CALL_SECONDS)

    assert [choice.index for choice in reply.choices] == list(range(len(COMPLETIONS)))
    assert {p["id"]: c.text for p, c in zip(COMPLETIONS, reply.choices, strict=True)} == {
        p["id"]: p["expect"] for p in COMPLETIONS
    }


def test_a_stream_brings_the_same_text_in_whole_characters(inference: Stub) -> None:
    """Deltas of single tokens join to the reply of the unary call; start first, then a finish, then one end."""
    chosen = [p for p in CHATS if p["kind"] in ("unicode", "think", "tool", "json")][:40]

    def ask(prompt: dict[str, Any]) -> tuple[str, list[str]]:
        request = inference_pb2.ChatStreamRequest(
            request=request_of(prompt), options=inference_pb2.StreamOptions(max_join_tokens=1)
        )
        joined = inference_pb2.ChatResponse()
        said = joined.choices.add().message
        said.content.add()
        events = list(inference.ChatStream(request, timeout=CALL_SECONDS))
        kinds: list[str] = [event.WhichOneof("event") or "" for event in events]
        for event in events:
            delta = event.delta
            assert (bool(delta.text), bool(delta.reasoning), bool(delta.tool_calls)).count(True) <= 1
            said.content[0].text += delta.text
            said.reasoning += delta.reasoning
            for part in delta.tool_calls:
                if part.id:
                    assert part.index == len(said.tool_calls)
                    said.tool_calls.add(id=part.id, name=part.name)
                said.tool_calls[part.index].arguments += part.arguments
        text = as_written(joined)
        assert "�" not in text
        assert events[0].start.model == "demo" and events[0].start.id.startswith("chatcmpl-")
        reason = TOOL_CALLS if said.tool_calls else STOP
        assert [event.finish.finish_reason for event in events if event.HasField("finish")] == [reason]
        usage = events[-1].end.usage
        assert usage.prompt_token_count == events[0].start.prompt_token_count
        assert usage.completion_token_count == sum(event.delta.token_count for event in events)
        return text, kinds

    with ThreadPoolExecutor(16) as pool:
        for prompt, (text, kinds) in zip(chosen, pool.map(ask, chosen), strict=True):
            assert text == prompt["expect"]
            assert kinds[0] == "start" and kinds[-2:] == ["finish", "end"]
            assert set(kinds[1:-2]) <= {"delta"}


def test_tokens_that_wait_are_joined_and_none_is_lost(inference: Stub) -> None:
    """However the tokens are cut into messages, the text is one; a message has at most the tokens asked for."""
    texts = []
    for limit in (1, 3, 256):
        events = list(
            inference.ChatStream(
                inference_pb2.ChatStreamRequest(
                    request=chat("Tell me a story."),
                    options=inference_pb2.StreamOptions(max_join_tokens=limit),
                ),
                timeout=CALL_SECONDS,
            )
        )
        texts.append("".join(event.delta.text for event in events))
    assert texts[0] == texts[1] == texts[2] == text_of(inference.Chat(chat("Tell me a story.")))


def test_max_tokens_ends_with_length_at_exactly_that_token(inference: Stub) -> None:
    whole = inference.Chat(chat("Tell me a story."))
    assert whole.usage.completion_token_count > 12
    for limit in (1, 2, 11):
        reply = inference.Chat(chat("Tell me a story.", max_tokens=limit))
        assert reply.usage.completion_token_count == limit
        assert reply.choices[0].finish_reason == LENGTH
        assert text_of(whole).startswith(text_of(reply))
    # One token more than the text needs: the end token itself.
    exact = inference.Chat(chat("Tell me a story.", max_tokens=whole.usage.completion_token_count))
    assert (text_of(exact), exact.choices[0].finish_reason) == (text_of(whole), STOP)


def test_the_end_of_the_context_ends_with_length(inference: Stub) -> None:
    """A max_tokens that does not fit is no error: what fits is generated."""
    context = inference.CountTokens(
        inference_pb2.CountTokensRequest(model="demo", prompt=inference_pb2.Prompt(text="a"))
    ).context_length
    prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[100] * (context - 5)))
    reply = inference.Generate(
        inference_pb2.GenerateRequest(
            model="demo",
            prompts=[prompt],
            sampling=sampling(max_tokens=50, logit_bias={0: -100.0, 2: -100.0}),
        )
    )
    assert reply.choices[0].finish_reason == LENGTH
    assert (reply.usage.prompt_token_count, reply.usage.completion_token_count) == (context - 5, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(inference: Stub, stream: bool) -> None:
    """Wherever it lies across the borders of tokens, nothing of it is delivered, and the match is reported."""
    question = "What is the capital of France?"
    answer = text_of(inference.Chat(chat(question)))
    for start in range(1, len(answer), 3):
        for size in (1, 2, 7):
            stop = answer[start : start + size]
            expected = answer[: answer.index(stop)]
            request = chat(question, stop=["never", stop])
            if stream:
                wrapped = inference_pb2.ChatStreamRequest(
                    request=request, options=inference_pb2.StreamOptions(max_join_tokens=1)
                )
                events = list(inference.ChatStream(wrapped))
                text = "".join(event.delta.text for event in events)
                (finish,) = [event.finish for event in events if event.HasField("finish")]
                reason, match = finish.finish_reason, finish.stop_sequence
            else:
                reply = inference.Chat(request)
                text = text_of(reply)
                reason, match = reply.choices[0].finish_reason, reply.choices[0].stop_sequence
            assert (text, reason, match) == (expected, STOP, stop)


def test_a_stop_string_that_only_begins_is_delivered_in_full(inference: Stub) -> None:
    answer = text_of(inference.Chat(chat("What is the capital of France?")))
    reply = inference.Chat(chat("What is the capital of France?", stop=[answer[-6:] + "!", "Paris, of"]))
    assert text_of(reply) == answer
    assert not reply.choices[0].HasField("stop_sequence")


def test_echo_puts_the_prompt_before_each_choice(inference: Stub, demo_tokenizer: Any) -> None:
    request = completion("The capital of", "One two", n=2, max_tokens=3)
    plain = [choice.text for choice in inference.Generate(request).choices]
    request.echo = True
    echoed = [choice.text for choice in inference.Generate(request).choices]
    assert echoed == [
        prompt + text for prompt, text in zip(["The capital of"] * 2 + ["One two"] * 2, plain, strict=True)
    ]
    events = inference.GenerateStream(inference_pb2.GenerateStreamRequest(request=request))
    streamed = [""] * 4
    for event in events:
        streamed[event.delta.index] += event.delta.text
    assert streamed == echoed
    ids = inference_pb2.TokenIds(ids=demo_tokenizer.encode("The capital of").ids)
    request.prompts[0].CopyFrom(inference_pb2.Prompt(token_ids=ids))
    assert [choice.text for choice in inference.Generate(request).choices] == echoed


def test_a_prompt_may_be_scored_and_not_continued(inference: Stub, demo_tokenizer: Any) -> None:
    """`max_tokens` 0 with `echo`, as tools that score texts ask; without log-probabilities too, and streamed."""
    prompts = ["The capital of France is Paris.", "One two"]
    request = completion(*prompts, n=2, max_tokens=0, top_logprobs=2)
    request.echo = True
    reply = inference.Generate(request)
    assert [choice.text for choice in reply.choices] == [text for text in prompts for _ in range(2)]
    assert all(choice.finish_reason == LENGTH for choice in reply.choices)
    assert (reply.usage.completion_token_count, reply.usage.prompt_token_count) == (
        0,
        sum(len(demo_tokenizer.encode(prompt).ids) for prompt in prompts),
    )
    longer = completion(*prompts, n=2, max_tokens=1, top_logprobs=2)
    longer.echo = True
    for choice, other in zip(reply.choices, inference.Generate(longer).choices, strict=True):
        assert not choice.logprobs
        assert [each.token_id for each in choice.prompt_logprobs] == [
            each.token_id for each in other.prompt_logprobs
        ]
        assert [each.logprob for each in choice.prompt_logprobs] == pytest.approx(
            [each.logprob for each in other.prompt_logprobs], abs=1e-3
        )
    request.sampling.ClearField("top_logprobs")
    events = list(inference.GenerateStream(inference_pb2.GenerateStreamRequest(request=request)))
    assert "".join(event.delta.text for event in events if event.delta.index == 3) == prompts[1]
    assert [event.WhichOneof("event") for event in events][-1] == "end"
    request.echo = False
    assert fails(lambda: inference.Generate(request)).fields == ["sampling.max_tokens"]


def test_token_ids_are_taken_as_they_are(inference: Stub, demo_tokenizer: Any) -> None:
    """The same tokens, as text and as ids, continue alike."""
    text = COMPLETIONS[0]["prompt"]
    ids = demo_tokenizer.encode(text).ids
    prompts = [
        inference_pb2.Prompt(text=text),
        inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=ids)),
    ]
    reply = inference.Generate(inference_pb2.GenerateRequest(model="demo", prompts=prompts))
    assert reply.choices[0].text == reply.choices[1].text == COMPLETIONS[0]["expect"]
    assert reply.usage.prompt_token_count == 2 * len(ids)


def test_choices_number_prompt_times_n_plus_choice(inference: Stub) -> None:
    request = completion("Once", "Twice", "Thrice", n=3, temperature=1.5, seed=5, max_tokens=8)
    reply = inference.Generate(request)
    assert [choice.index for choice in reply.choices] == list(range(9))
    assert reply.usage.completion_token_count <= 9 * 8
    # Each prompt is counted once, however many choices.
    alone = inference.Generate(completion("Once", "Twice", "Thrice", max_tokens=1)).usage
    assert reply.usage.prompt_token_count == alone.prompt_token_count
    events = list(inference.GenerateStream(inference_pb2.GenerateStreamRequest(request=request)))
    assert sorted(event.finish.index for event in events if event.HasField("finish")) == list(range(9))
    for choice in reply.choices:
        assert choice.text == "".join(e.delta.text for e in events if e.delta.index == choice.index)


def test_thinking_is_the_caller_s_choice(inference: Stub) -> None:
    """template_arguments reach the template: with enable_thinking the reply begins with a thought."""
    prompt = next(p for p in CHATS if p["kind"] == "think")
    request = request_of(prompt)
    assert "enable_thinking" in request.template_arguments
    for arguments in ('{"enable_thinking": true}', '{"reasoning_effort": "low"}'):
        request.template_arguments = arguments
        assert inference.Chat(request).choices[0].message.reasoning
    for arguments in ('{"enable_thinking": false}', '{"reasoning_effort": "none"}'):
        request.template_arguments = arguments
        reply = inference.Chat(request)
        assert not reply.choices[0].message.reasoning and reply.usage.reasoning_token_count == 0


def count(inference: Stub, request: inference_pb2.ChatRequest) -> int:
    return inference.CountTokens(inference_pb2.CountTokensRequest(model="demo", chat=request)).token_count


def test_tools_reach_the_template_unless_the_caller_says_none(inference: Stub) -> None:
    prompt = next(p for p in CHATS if p["kind"] == "tool" and p.get("tools"))
    request = request_of(prompt)
    with_tools = count(inference, request)
    request.tool_choice.mode = inference_pb2.ToolChoice.MODE_NONE
    assert count(inference, request) < with_tools
    request.ClearField("tool_choice")
    request.ClearField("tools")
    assert count(inference, request) < with_tools


def tool_request(id: str) -> inference_pb2.ChatRequest:
    return request_of(next(p for p in CHATS if p["id"] == id))


def test_one_call_of_two_where_parallel_calls_are_not_wanted(inference: Stub) -> None:
    request = tool_request("tool-14")
    assert len(inference.Chat(request).choices[0].message.tool_calls) == 2
    request.parallel_tool_calls = False
    choice = inference.Chat(request).choices[0]
    assert [call.arguments for call in choice.message.tool_calls] == ['{"city": "Paris"}']
    assert choice.finish_reason == TOOL_CALLS


def test_a_developer_message_is_a_system_message(inference: Stub) -> None:
    prompt = next(p for p in CHATS if p["kind"] == "system")
    request = request_of(prompt)
    (system,) = [m for m in request.messages if m.role == inference_pb2.ROLE_SYSTEM]
    system.role = inference_pb2.ROLE_DEVELOPER
    assert text_of(inference.Chat(request)) == prompt["expect"]


def test_content_parts_are_joined_and_images_left_out_with_a_warning(inference: Stub) -> None:
    request = chat("What is the capital of France?")
    request.messages[0].content.add(image=inference_pb2.Image(data=b"\x89PNG"))
    request.messages[0].content.add(image=inference_pb2.Image(data=b"\x89PNG"))
    reply = inference.Chat(request)
    assert text_of(reply) == "The capital of France is Paris."
    assert len([warning for warning in reply.warnings if "image" in warning]) == 1
    events = list(inference.ChatStream(inference_pb2.ChatStreamRequest(request=request)))
    assert list(events[0].start.warnings) == list(reply.warnings)


def test_what_takes_effect_is_not_warned_of(inference: Stub) -> None:
    request = chat("What is the capital of France?")
    request.keep_alive.seconds = 1800
    request.priority = 5
    assert list(inference.Chat(request).warnings) == []


def test_the_model_says_what_its_replies_may_be(
    inference: Stub, models: model_pb2_grpc.ModelServiceStub
) -> None:
    """The same before a load, from the template, and after it, from mlx-lm."""
    models.UnloadModel(model_pb2.UnloadModelRequest(name="demo"))
    for _ in range(2):
        model = models.GetModel(model_pb2.GetModelRequest(name="demo")).model
        assert model.tool_format == "json_tools" and not model.notes
        assert {
            model_pb2.CAPABILITY_TOOLS,
            model_pb2.CAPABILITY_REASONING,
            model_pb2.CAPABILITY_STRUCTURED_OUTPUT,
            model_pb2.CAPABILITY_LOGPROBS,
        } <= set(model.capabilities)
        inference.Chat(chat("Hello.", max_tokens=1), timeout=CALL_SECONDS)


def test_timing_tells_where_the_time_went(inference: Stub) -> None:
    timing = inference.Chat(chat("Tell me a story.")).timing
    total = timing.total.ToMicroseconds()
    assert 0 < timing.first_token.ToMicroseconds() <= total
    assert timing.decode.ToMicroseconds() <= total
    assert not timing.HasField("load") and timing.tokens_per_second > 0


def test_a_conversation_goes_on(inference: Stub) -> None:
    """Earlier turns are part of the prompt."""
    prompt = next(p for p in CHATS if p["kind"] == "history" and len(p["messages"]) > 2)
    request = request_of(prompt)
    stream = inference.ChatStream(inference_pb2.ChatStreamRequest(request=request))
    first = until_first_delta(stream)
    assert first.delta.token_count >= 1
    assert first.delta.text + "".join(event.delta.text for event in stream) == prompt["expect"]
    request.messages.insert(0, message("Hello."))
    assert count(inference, request) > count(inference, request_of(prompt))
