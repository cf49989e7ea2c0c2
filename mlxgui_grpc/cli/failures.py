"""What the user reads and the shell gets when a command fails."""

import errno

from mlxgui_grpc.client import ServerUnreachableError
from mlxgui_grpc.errors import (
    InvalidRequestError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelServerError,
    UnauthenticatedError,
)

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """A failure of the command itself, which never reached a server: one sentence and its exit code."""

    def __init__(self, sentence: str, exit_code: int = EXIT_ERROR) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def explain(error: Exception) -> tuple[str, int]:
    """One sentence that names the thing and the way out, and the exit code."""
    if isinstance(error, CommandError):
        return str(error), error.exit_code
    if isinstance(error, ModelServerError):
        return _sentence(error), _exit_code(error)
    if isinstance(error, OSError):
        return _os_sentence(error), EXIT_ERROR
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"This is a bug ({words}): MLX_GUI_DEBUG=1 shows where", EXIT_ERROR


def _exit_code(error: ModelServerError) -> int:
    if isinstance(error, ServerUnreachableError):
        return EXIT_UNREACHABLE
    if isinstance(error, InvalidRequestError):
        return EXIT_USAGE
    return EXIT_NOT_FOUND if error.status.name == "NOT_FOUND" else EXIT_ERROR


def _sentence(error: ModelServerError) -> str:
    """The server's sentence; where that speaks of the REST API, what to do in this command line."""
    name = error.metadata.get("model", "")
    if isinstance(error, ModelNotFoundError) and name:
        return f"Model '{name}' is not installed: `mlxgui ls` lists those that are, {install_hint(name)}"
    if isinstance(error, ModelNotLoadedError) and name:
        return f"Model '{name}' is not loaded: load it with `mlxgui load {name}`"
    if isinstance(error, ModelInUseError) and "--force" not in error.message:
        return f"{error.message.rstrip('.')} (--force ends its requests)"
    if isinstance(error, UnauthenticatedError):
        # The server goes on to speak of metadata, which is for programs.
        return f"{error.message.partition(':')[0].rstrip('.')}: set MLX_GUI_API_KEY or give --api-key"
    if error.retry_after_seconds:
        return f"{error.message.rstrip('.')} (try again in {error.retry_after_seconds:.0f} s)"
    return error.message


def install_hint(name: str) -> str:
    """How to come by a model that is not there."""
    return f"`mlxgui pull {name}` installs it" if "/" in name else f"`mlxgui pull OWNER/{name}` installs one"


def _os_sentence(error: OSError) -> str:
    # What the bridge says when it cannot start reaches us as its own line on stderr.
    words = (error.strerror or str(error)).removeprefix("mlxgui bridge: ")
    if error.errno == errno.ENOSPC:
        return f"{words}: free some space and try again"
    return f"{error.filename}: {words}" if error.filename else words
