"""`run` and `chat`: one question and its answer, or a conversation at the terminal."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgui.v1 import inference_pb2, model_pb2
from mlxgui_grpc.cli import progress
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import (
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    CommandError,
    explain,
    install_hint,
)
from mlxgui_grpc.cli.models import install, parse_source
from mlxgui_grpc.client import Sampling, ServerUnreachableError, chat_message, finish_reason
from mlxgui_grpc.errors import ModelNotFoundError, ModelServerError

if TYPE_CHECKING:
    from mlxgui_grpc.client import Client

HELP = """/bye          leave (so does Ctrl-D)
/clear        forget the conversation
/system TEXT  instruct the model from now on
\"\"\"           begin or end a message of several lines
Ctrl-C        stop the answer"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What the user said about the conversation."""

    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    images: Sequence[Path] = ()
    assume_yes: bool = False
    show_statistics: bool = False


def run(connection: Connection, name: str, words: Sequence[str], options: ChatOptions) -> int:
    """Answer `words` (`-` is stdin), else stdin, or at a terminal converse; returns the exit code."""
    images = [_read_image(path) for path in options.images]
    is_conversation = not words and sys.stdin.isatty()
    text = "" if is_conversation else one_shot_text(words)
    with connection.open() as client:
        model = _find(client, name, options.assume_yes, shares_files=connection.shares_files)
        conversation = Conversation(client, model.name, options)
        if not is_conversation:
            return conversation.answer(text, images)
        if model.state != model_pb2.MODEL_STATE_LOADED:
            progress.follow(client.load(model.name), [])
        return _converse(conversation, images)


def one_shot_text(words: Sequence[str]) -> str:
    """The question: the words, with stdin in place of `-`; without words stdin. An empty one is an error."""
    parts = [_read_stdin() if word == "-" else word for word in words or ["-"]]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise CommandError("There is nothing to answer: give a PROMPT, or text on stdin", EXIT_USAGE)
    return text


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, client: "Client", model: str, options: ChatOptions) -> None:
        self._client = client
        self._options = options
        self.model = model
        self.system = options.system
        self._messages: list[inference_pb2.ChatMessage] = []

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self._messages.clear()

    def answer(self, text: str, images: Sequence[bytes] = ()) -> int:
        """Write the answer to stdout as it comes; returns the exit code.

        Interrupted, it ends there and is remembered as far as it came.
        """
        question = chat_message("user", text, images)
        system = [chat_message("system", self.system)] if self.system else []
        printer = _Printer()
        exit_code = 0
        stream = self._client.stream_chat(
            self.model, [*system, *self._messages, question], **self._options.sampling
        )
        with stream:
            try:
                for event in stream:
                    printer.show(event)
            except KeyboardInterrupt:
                exit_code = EXIT_INTERRUPTED
            finally:
                printer.end()
        if exit_code:
            print("(stopped)", file=sys.stderr)
        elif self._options.show_statistics:
            print(printer.statistics(), file=sys.stderr)
        self._messages += [question, chat_message("assistant", printer.text)]
        return exit_code


class _Printer:
    """Writes the events of a reply. What the model thinks is shown dimmed, and only to people."""

    def __init__(self) -> None:
        self.text = ""
        self._is_terminal = sys.stdout.isatty()
        self._is_thinking = False
        self._ends_line = True
        self._end = inference_pb2.StreamEnd()

    def show(self, event: object) -> None:
        if isinstance(event, inference_pb2.ChatDelta):
            if event.reasoning and self._is_terminal:
                self._think(True)
                self._write(event.reasoning)
            if event.text:
                self._think(False)
                self._write(event.text)
                self.text += event.text
        elif isinstance(event, inference_pb2.StreamStart):
            self._warn(event.warnings)
        elif isinstance(event, inference_pb2.StreamFinish):
            if finish_reason(event.finish_reason) == "length":
                self._think(False)
                self._break_line()
                print("(cut off: --max-tokens or the context was reached)", file=sys.stderr)
        elif isinstance(event, inference_pb2.StreamEnd):
            self._end = event
            self._warn(event.warnings)

    def end(self) -> None:
        """Leave the terminal as it was, at the start of a line."""
        self._think(False)
        self._break_line()

    def statistics(self) -> str:
        usage, timing = self._end.usage, self._end.timing
        return (
            f"{usage.prompt_token_count} prompt tokens, {usage.completion_token_count} completion tokens, "
            f"{timing.tokens_per_second:.1f} tokens/s, "
            f"first after {timing.first_token.ToTimedelta().total_seconds():.2f} s"
        )

    def _think(self, is_thinking: bool) -> None:
        if is_thinking == self._is_thinking:
            return
        self._is_thinking = is_thinking
        if is_thinking:
            sys.stdout.write("\x1b[2m")
        else:
            sys.stdout.write("\x1b[0m")
            self._break_line()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._ends_line = text.endswith("\n")

    def _break_line(self) -> None:
        if not self._ends_line:
            self._write("\n")

    def _warn(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self._break_line()
            print(f"Note: {warning}", file=sys.stderr)


def _converse(conversation: Conversation, images: Sequence[bytes]) -> int:
    # Importing it gives `input` its line editing and history.
    import readline  # noqa: F401

    print(f"{conversation.model} listens. /bye leaves, /help says what else there is.", file=sys.stderr)
    while True:
        try:
            text = _read_message()
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print("\n/bye or Ctrl-D leaves", file=sys.stderr)
            continue
        command, _, argument = text.strip().partition(" ")
        if not command:
            continue
        if command in ("/bye", "/exit", "/quit"):
            return 0
        if command == "/clear":
            conversation.clear()
        elif command == "/system":
            conversation.system = argument
        elif command in ("/help", "/?"):
            print(HELP, file=sys.stderr)
        else:
            try:
                conversation.answer(text, images)
                images = ()
            except ServerUnreachableError:
                raise
            except ModelServerError as error:
                # The session goes on: the next question may well be answered.
                print(f"mlxgui: {explain(error)[0]}", file=sys.stderr)


def _read_message() -> str:
    line = input(">>> ")
    if not line.startswith('"""'):
        return line
    lines = [line.removeprefix('"""')]
    while not lines[-1].endswith('"""'):
        lines.append(input("... "))
    return "\n".join(lines).removesuffix('"""')


def _find(client: "Client", name: str, assume_yes: bool, *, shares_files: bool) -> model_pb2.Model:
    """The model of that name; one that is missing is pulled if the user wants it."""
    try:
        return client.model(name)
    except ModelNotFoundError:
        pass
    try:
        source = parse_source(name, must_exist=shares_files)
    except CommandError:
        source = ""
    if not source:
        raise CommandError(
            f"Model '{name}' is not installed: `mlxgui ls` lists those that are, {install_hint(name)}",
            EXIT_NOT_FOUND,
        )
    if not assume_yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise CommandError(
                f"Model '{name}' is not installed: install it with `mlxgui pull {name}`, or say --yes",
                EXIT_NOT_FOUND,
            )
        print(f"Model '{name}' is not installed: pull it now? [y/N] ", end="", file=sys.stderr, flush=True)
        if input().strip().lower() not in ("y", "yes"):
            raise CommandError(
                f"Model '{name}' is not installed: `mlxgui pull {name}` installs it", EXIT_NOT_FOUND
            )
    return install(client, source)


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _read_image(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror} (--image)", EXIT_USAGE) from error
