"""The bodies of /v1/chat/completions and /v1/completions as requests of the contract."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields
from rest_bridge.openai.field_lists import refuse_fields, unread_warnings
from rest_bridge.openai.formats import read_constraint
from rest_bridge.openai.images import ImageBudget
from rest_bridge.openai.messages import read_message
from rest_bridge.openai.options import Options
from rest_bridge.openai.prompts import read_prompts
from rest_bridge.openai.reasoning import read_reasoning
from rest_bridge.openai.sampling import read_sampling, read_scheduling
from rest_bridge.openai.tools import read_tools

_Request = (
    inference_pb2.ChatRequest
    | inference_pb2.GenerateRequest
    | inference_pb2.EmbedRequest
    | inference_pb2.RerankRequest
)


def chat_request(body: JsonObject) -> tuple[inference_pb2.ChatRequest, Options]:
    """The chat that a body of /v1/chat/completions asks for. Raises ApiError (400, 413)."""
    fields = Fields(body)
    options = Options(model=fields.text("model") or "")
    request = inference_pb2.ChatRequest(model=options.model)
    read_common(fields, request, options)

    refuse_fields(fields, "chat")
    modalities = fields.array("modalities")
    if modalities is not None and modalities != ["text"]:
        raise invalid('`modalities` can only be ["text"].', "modalities")

    if fields.boolean("logprobs"):
        request.sampling.top_logprobs = fields.integer("top_logprobs") or 0
        options.logprobs = True
    elif fields.integer("top_logprobs"):
        raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")

    read_tools(fields, request, options)
    read_reasoning(fields, request, options)

    messages = fields.array("messages")
    if messages is None:
        fields.missing("messages")
    if not messages:
        raise invalid("`messages` is empty; send at least one message.", "messages")
    images = ImageBudget()
    for index, message in enumerate(messages):
        request.messages.append(read_message(fields.child(message, f"messages[{index}]"), images))

    report_unread(fields, options)
    return request, options


def completion_request(body: JsonObject) -> tuple[inference_pb2.GenerateRequest, Options]:
    """The continuation that a body of /v1/completions asks for. Raises ApiError (400)."""
    fields = Fields(body)
    options = Options(model=fields.text("model") or "")
    request = inference_pb2.GenerateRequest(model=options.model)
    read_common(fields, request, options)

    refuse_fields(fields, "completions")
    request.echo = fields.boolean("echo") or False
    logprobs = fields.integer("logprobs")
    if logprobs is not None:
        request.sampling.top_logprobs = logprobs
        options.logprobs = True
        options.param_names["top_logprobs"] = "logprobs"

    prompts = read_prompts(fields, "prompt")
    options.single_input = len(prompts) == 1
    request.prompts.extend(prompts)
    report_unread(fields, options)
    return request, options


def read_common(
    fields: Fields, request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest, options: Options
) -> None:
    """Reads what chats and completions share. Raises ApiError (400)."""
    sampling = request.sampling
    read_sampling(fields, sampling)
    read_constraint(fields, sampling, options)
    longer_name = fields.integer("max_completion_tokens")
    if longer_name is not None:
        if sampling.HasField("max_tokens") and sampling.max_tokens != longer_name:
            raise invalid("Send `max_completion_tokens` or `max_tokens`, not both.", "max_tokens")
        sampling.max_tokens = longer_name
        options.param_names["max_tokens"] = "max_completion_tokens"
    n = fields.integer("n")
    if n is not None:
        sampling.n = n
        options.choice_count = n
    read_scheduling(fields, request)
    read_user(fields, request, options)
    options.stream = fields.boolean("stream") or False
    stream_options = fields.members("stream_options")
    if stream_options is not None:
        if not options.stream:
            raise invalid("`stream_options` needs `stream` to be true.", "stream_options")
        options.include_usage = stream_options.boolean("include_usage") or False
        if stream_options.boolean("include_obfuscation"):
            options.warnings.append("`stream_options.include_obfuscation` has no effect.")


def read_user(fields: Fields, request: _Request, options: Options) -> None:
    """Reads the caller's own name for its user, of which the server's log makes use and nothing else does."""
    user = fields.text("user")
    if user:
        request.user = user
        options.warnings.append("`user` has no effect: it only reaches the log.")


def report_unread(fields: Fields, options: Options) -> None:
    """Adds a warning for each field that has no effect; to be called when everything has been read."""
    options.warnings.extend(unread_warnings(fields))
