"""Renders chat templates and tokenizes: all that happens to a prompt before it reaches the MLX thread."""

import json
import signal
import threading
from collections.abc import Callable
from typing import Any

from mlxgui_grpc.engine.frames import Prompt
from mlxgui_grpc.engine.history import adapted
from mlxgui_grpc.engine.template_variables import variables_of
from mlxgui_grpc.errors import (
    ContextLengthExceededError,
    InvalidRequestError,
    ModelTypeMismatchError,
    ModelUnsafeError,
)

RENDER_LIMIT_SECONDS = 2.0
"""A template that takes longer to render than this is a program, not a template (rulings.md)."""
_NAMES = {
    "reasoning_effort": {"reasoning_effort", "enable_thinking", "thinking"},
    "enable_thinking": {"enable_thinking", "thinking"},
}
"""How much or whether to think, as requests call it, and as which variables templates may get it."""


class PromptTokenizer:
    """The tokenizer and template of one model. Not thread-safe: one helper thread of the worker uses it."""

    def __init__(
        self,
        tokenizer: Any,
        render: Callable[..., str] | None,
        vocabulary_size: int,
        context_length: int,
        on_runaway: Callable[[], None],
    ) -> None:
        """`tokenizer` is a transformers tokenizer; `on_runaway` is called from another thread when a template
        overruns its time, and is expected not to return: nothing can interrupt the rendering itself."""
        longest_token_bytes = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)
        self._context_length = context_length
        # No text of more bytes fits the context; what normalizers and templates leave out is allowed for.
        self._max_prompt_bytes = 2 * context_length * longest_token_bytes + (1 << 20)
        self._tokenizer = tokenizer
        self._template = render
        source = tokenizer.chat_template
        self._source = source if isinstance(source, str) else json.dumps(source) if source else ""
        self._variables = variables_of(self._source)
        self._vocabulary_size = vocabulary_size
        self._on_runaway = on_runaway

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; raises InvalidRequestError when there are none or one is out of range."""
        self._refuse_huge(len(prompt.messages) + len(prompt.tools) + len(prompt.text or ""))
        if prompt.messages:
            ids = self._encode(self.render(prompt), add_special_tokens=False)
        elif prompt.text is not None:
            ids = self._encode(prompt.text, add_special_tokens=True)
        else:
            ids = list(prompt.token_ids)
            bad = next((token for token in ids if not 0 <= token < self._vocabulary_size), None)
            if bad is not None:
                raise InvalidRequestError(
                    f"token id {bad} is outside the vocabulary of {self._vocabulary_size} tokens",
                    field="prompt",
                )
        if not ids:
            raise InvalidRequestError("the prompt has no tokens", field="prompt")
        return ids

    def _refuse_huge(self, size_bytes: int) -> None:
        """Spare the other requests the seconds that tokenizing a hopeless prompt would take."""
        if size_bytes > self._max_prompt_bytes:
            raise ContextLengthExceededError(
                f"the prompt has {size_bytes} bytes, and {self._context_length} tokens, the model's context, "
                f"never take more than {self._max_prompt_bytes}; shorten it"
            )

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def render(self, prompt: Prompt) -> str:
        """The text of a chat; raises InvalidRequestError when the template refuses it."""
        self._refuse_huge(len(prompt.messages) + len(prompt.tools))
        if self._template is None:
            raise ModelTypeMismatchError(
                "this model has no chat template; use a completion (Generate, POST /v1/completions) instead",
                field="model",
            )
        arguments = self._arguments(
            json.loads(prompt.template_arguments) if prompt.template_arguments else {}
        )
        tools = json.loads(prompt.tools) if prompt.tools else None
        messages = adapted(json.loads(prompt.messages), self._source, has_tools=bool(tools))
        for tool in tools or ():
            tool["function"].pop("strict", None)  # For the decoder; no model was trained to read it.
        watchdog = threading.Timer(RENDER_LIMIT_SECONDS, self._on_runaway)
        watchdog.daemon = True
        watchdog.start()
        # The kernel's own timer, for templates that hold the interpreter so that no other thread runs.
        signal.setitimer(signal.ITIMER_REAL, 2 * RENDER_LIMIT_SECONDS)
        try:
            return self._template(messages, tools=tools, **{"add_generation_prompt": True, **arguments})
        except Exception as error:  # Templates raise what they like: TemplateError, TypeError, SecurityError.
            if type(error).__name__ == "SecurityError":
                raise ModelUnsafeError(f"the chat template tried to leave its sandbox: {error}") from error
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            watchdog.cancel()

    def warnings(self, prompt: Prompt) -> list[str]:
        """What of the request the template knows nothing of, as sentences."""
        if not prompt.template_arguments or not prompt.messages or not self._source:
            return []
        given = json.loads(prompt.template_arguments)
        return [
            f"{name} has no effect: this model's chat template does not know it"
            for name, variables in _NAMES.items()
            if name in given and self._variables.isdisjoint(variables)
        ]

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The variables of a request, and what they are called where templates differ.

        Whether to think: most templates know `enable_thinking`, some `thinking`, some `reasoning_effort`.
        """
        arguments = dict(given)
        effort = arguments.get("reasoning_effort")
        if effort is not None and "reasoning_effort" not in self._variables:
            arguments.setdefault("enable_thinking", effort != "none")
        if not self._source:  # A renderer of mlx-lm's, which takes no variables that it does not know.
            arguments.pop("reasoning_effort", None)
        elif "enable_thinking" in arguments and "enable_thinking" not in self._variables:
            arguments.setdefault("thinking", arguments["enable_thinking"])
        return arguments
