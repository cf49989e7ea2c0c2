"""How much a request lets the model think."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields, json_text
from rest_bridge.openai.options import Options

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def read_reasoning(fields: Fields, request: inference_pb2.ChatRequest, options: Options) -> None:
    """Reads the variables of the chat template and the thinking budget. Raises ApiError (400).

    Templates know thinking under two names, so that an effort sets both: `reasoning_effort` as it is, and
    `enable_thinking`, which is false for `none` only. What `enable_thinking` and `chat_template_kwargs` say wins.
    """
    arguments: JsonObject = {}
    effort = fields.text("reasoning_effort")
    if effort is not None:
        arguments = effort_arguments(effort, "reasoning_effort")
    enabled = fields.boolean("enable_thinking")
    if enabled is not None:
        arguments["enable_thinking"] = enabled
    arguments.update(fields.free_object("chat_template_kwargs") or {})
    if arguments:
        request.template_arguments = json_text(arguments, "chat_template_kwargs")
    budget = fields.integer("thinking_budget")
    if budget is not None:
        if (
            request.sampling.HasField("max_thinking_tokens")
            and request.sampling.max_thinking_tokens != budget
        ):
            raise invalid("Send `max_thinking_tokens` or `thinking_budget`, not both.", "thinking_budget")
        request.sampling.max_thinking_tokens = budget
        options.param_names["max_thinking_tokens"] = "thinking_budget"


def effort_arguments(effort: str, name: str) -> JsonObject:
    """The template's variables for an effort; `name` is what its caller calls it. Raises ApiError (400)."""
    if effort not in EFFORTS:
        raise invalid(f"`{name}` is {effort[:32]!r}; it must be one of {', '.join(EFFORTS)}.", name)
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}
