"""Every way a request can fail, as one tree.

Each class is one reason of `mlxgui.v1.ErrorReason` (its name without prefix) and the gRPC status that
carries it. Nothing else in the program names a status code: servicers raise, one interceptor converts.

    ModelServerError
    ├── INVALID_ARGUMENT      InvalidRequestError, ContextLengthExceededError, InvalidImageError,
    │                         UrlBlockedError, UrlFetchFailedError
    ├── NOT_FOUND             ModelNotFoundError, OperationNotFoundError, SettingNotFoundError,
    │                         HubRepositoryNotFoundError
    ├── ALREADY_EXISTS        ModelExistsError
    ├── FAILED_PRECONDITION   ModelNotLoadedError, ModelIncompatibleError, ModelTypeMismatchError,
    │                         ModelUnsafeError, ModelInUseError, InsufficientMemoryError,
    │                         HardwareIncompatibleError, StateDirectoryLockedError
    ├── RESOURCE_EXHAUSTED    QueueFullError, SlowConsumerError, PayloadTooLargeError, DiskFullError,
    │                         HubRateLimitedError
    ├── UNAVAILABLE           ServerDrainingError, EngineDeadError, HubUnavailableError
    ├── UNAUTHENTICATED       UnauthenticatedError
    ├── PERMISSION_DENIED     PermissionDeniedError, HubAccessDeniedError
    ├── DEADLINE_EXCEEDED     DeadlineError
    ├── CANCELLED             OperationCancelledError
    ├── UNIMPLEMENTED         NotImplementedYetError
    └── INTERNAL              ModelLoadFailedError, GenerationFailedError, OutOfMemoryError,
                              ModelDeleteFailedError, InternalError
"""

from typing import ClassVar

from grpc import StatusCode

MAX_MESSAGE_BYTES = 1024
"""gRPC loses the real status when metadata exceed its soft limit of 8 KiB; messages stay far below."""


class ModelServerError(Exception):
    """A failure with a reason that clients can act on.

    `metadata` repeats each dynamic part of the message (AIP-193); `field` names the request field at
    fault, as a path of proto names; `retry_after_seconds` says when a repeat may succeed.
    """

    status: ClassVar[StatusCode]
    reason: ClassVar[str]

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_seconds: float | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(_clip(message))
        self.message = _clip(message)
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata = {key: _clip(value) for key, value in metadata.items()}


def _clip(text: str) -> str:
    encoded = text.encode("utf-8", "replace")  # Half a surrogate pair fits neither protobuf nor SQLite.
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return encoded.decode()
    return encoded[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."


class InvalidRequestError(ModelServerError):
    """The caller's mistake: a field has a value it cannot have."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_PARAMETER"


class ContextLengthExceededError(ModelServerError):
    """The prompt alone does not fit the model's context."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "CONTEXT_LENGTH_EXCEEDED"


class InvalidImageError(ModelServerError):
    """The bytes are no picture that can be read."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_IMAGE"


class UrlBlockedError(ModelServerError):
    """The URL is one that this server does not fetch."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "URL_BLOCKED"


class UrlFetchFailedError(ModelServerError):
    """The URL could not be fetched; what was there is nobody's business."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "URL_FETCH_FAILED"


class ModelNotFoundError(ModelServerError):
    """No installed model has this name or hub id."""

    status = StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"

    @classmethod
    def of(cls, name: str) -> "ModelNotFoundError":
        """The documented sentence, which the document holds every route to."""
        return cls(f"Model '{name}' not found", model=name, hint=f"mlxgui pull {name}")


class OperationNotFoundError(ModelServerError):
    """No operation has this id."""

    status = StatusCode.NOT_FOUND
    reason = "OPERATION_NOT_FOUND"


class SettingNotFoundError(ModelServerError):
    """No setting has this key."""

    status = StatusCode.NOT_FOUND
    reason = "SETTING_NOT_FOUND"


class HubRepositoryNotFoundError(ModelServerError):
    """The hub has no such repository or revision, or hides it from this token."""

    status = StatusCode.NOT_FOUND
    reason = "HUB_REPO_NOT_FOUND"


class ModelExistsError(ModelServerError):
    """The name belongs to another model."""

    status = StatusCode.ALREADY_EXISTS
    reason = "MODEL_ALREADY_EXISTS"


class ModelNotLoadedError(ModelServerError):
    """The call asked for a model in memory and it is not."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_NOT_LOADED"

    @classmethod
    def of(cls, name: str) -> "ModelNotLoadedError":
        """The documented sentence."""
        return cls(
            f"Model '{name}' is not loaded. Load it first with POST /v1/models/{name}/load", model=name
        )


class ModelIncompatibleError(ModelServerError):
    """The files are not something that the engine can load."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_INCOMPATIBLE"


class ModelTypeMismatchError(ModelServerError):
    """The model cannot do what was asked: a chat with an embedding model, say."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_TYPE_MISMATCH"


class ModelUnsafeError(ModelServerError):
    """The checkpoint would run code of its own."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_UNSAFE"


class ModelInUseError(ModelServerError):
    """The model is serving requests, or its files belong to another entry too."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_IN_USE"


class InsufficientMemoryError(ModelServerError):
    """The model cannot fit in memory, whatever is evicted."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "INSUFFICIENT_MEMORY"


class HardwareIncompatibleError(ModelServerError):
    """MLX does not run on this machine."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "HARDWARE_INCOMPATIBLE"

    @classmethod
    def of(cls, cause: str) -> "HardwareIncompatibleError":
        """The documented sentence, then what really went wrong."""
        return cls(
            f"❌ MLX requires Apple Silicon (M1/M2/M3) hardware; on this machine it failed: {cause}",
            hint="mlxgui doctor",
        )


class StateDirectoryLockedError(ModelServerError):
    """Another server holds the state directory."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "STATE_DIR_LOCKED"


class QueueFullError(ModelServerError):
    """Too many requests wait for this model already."""

    status = StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class SlowConsumerError(ModelServerError):
    """The caller stopped reading its stream."""

    status = StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_CONSUMER"


class PayloadTooLargeError(ModelServerError):
    """More bytes than the limit."""

    status = StatusCode.RESOURCE_EXHAUSTED
    reason = "PAYLOAD_TOO_LARGE"


class DiskFullError(ModelServerError):
    """The disk cannot hold what was to be written."""

    status = StatusCode.RESOURCE_EXHAUSTED
    reason = "DISK_FULL"


class HubRateLimitedError(ModelServerError):
    """The hub asks for patience."""

    status = StatusCode.RESOURCE_EXHAUSTED
    reason = "HUB_RATE_LIMITED"


class ServerDrainingError(ModelServerError):
    """The server is stopping and takes no new work."""

    status = StatusCode.UNAVAILABLE
    reason = "SERVER_DRAINING"


class EngineDeadError(ModelServerError):
    """The worker process of the model ended while the request ran."""

    status = StatusCode.UNAVAILABLE
    reason = "ENGINE_DEAD"


class HubUnavailableError(ModelServerError):
    """The hub cannot be reached, or fails."""

    status = StatusCode.UNAVAILABLE
    reason = "HUB_UNAVAILABLE"


class UnauthenticatedError(ModelServerError):
    """No key, or a wrong one."""

    status = StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDeniedError(ModelServerError):
    """The caller may not do this here."""

    status = StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class HubAccessDeniedError(ModelServerError):
    """The repository is gated and the token does not open it."""

    status = StatusCode.PERMISSION_DENIED
    reason = "HUB_ACCESS_DENIED"


class DeadlineError(ModelServerError):
    """The caller's deadline, or the server's cap, passed."""

    status = StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE"


class OperationCancelledError(ModelServerError):
    """Somebody cancelled the operation."""

    status = StatusCode.CANCELLED
    reason = "CANCELLED"


class NotImplementedYetError(ModelServerError):
    """The contract declares it and this version does not do it."""

    status = StatusCode.UNIMPLEMENTED
    reason = "NOT_IMPLEMENTED"


class ModelLoadFailedError(ModelServerError):
    """The loader gave up; the message says why."""

    status = StatusCode.INTERNAL
    reason = "MODEL_LOAD_FAILED"


class GenerationFailedError(ModelServerError):
    """The engine raised while it worked on the request."""

    status = StatusCode.INTERNAL
    reason = "GENERATION_FAILED"


class OutOfMemoryError(ModelServerError):
    """Memory ran out while the request ran."""

    status = StatusCode.INTERNAL
    reason = "OUT_OF_MEMORY"


class ModelDeleteFailedError(ModelServerError):
    """The files could not be removed."""

    status = StatusCode.INTERNAL
    reason = "MODEL_DELETE_FAILED"


class InternalError(ModelServerError):
    """A fault of ours; the log has the traceback under the request id."""

    status = StatusCode.INTERNAL
    reason = "INTERNAL"


def _leaves(cls: type[ModelServerError]) -> list[type[ModelServerError]]:
    return (
        [cls] if hasattr(cls, "reason") else [leaf for sub in cls.__subclasses__() for leaf in _leaves(sub)]
    )


BY_REASON: dict[str, type[ModelServerError]] = {leaf.reason: leaf for leaf in _leaves(ModelServerError)}
"""The class of each reason; a failure that crossed a process boundary is raised again from it."""
