"""The tree of errors, and the details that clients get of them."""

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from mlxgui_grpc import errors
from mlxgui_grpc.errors import BY_REASON, MAX_MESSAGE_BYTES, ModelServerError


def leaves(cls: type[ModelServerError]) -> list[type[ModelServerError]]:
    below = [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]
    return below or [cls]


def test_every_class_has_a_reason_of_its_own_and_is_drawn_in_the_tree() -> None:
    # The clients' own classes come below these.
    found = [leaf for leaf in leaves(ModelServerError) if leaf.__module__ == errors.__name__]
    assert sorted(leaf.reason for leaf in found) == sorted(BY_REASON)
    assert errors.__doc__ is not None
    for leaf in found:
        assert isinstance(leaf.status, StatusCode) and leaf.status is not StatusCode.OK
        assert leaf.__name__ in errors.__doc__
        line = next(line for line in errors.__doc__.splitlines() if leaf.status.name in line)
        assert line, leaf


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 2000, "🙂" * 1500, "\ud800" * 3000])
def test_messages_and_metadata_stay_below_what_grpc_carries(text: str) -> None:
    error = errors.ModelNotFoundError(text, model=text)
    for value in (error.message, error.metadata["model"]):
        assert len(value.encode("utf-8", "replace")) <= MAX_MESSAGE_BYTES
        assert value.endswith("...")


def test_messages_and_metadata_are_text_that_protobuf_and_sqlite_take() -> None:
    error = errors.InvalidRequestError("bad \ud800", name="\udfff")
    assert (error.message, error.metadata) == ("bad ?", {"name": "?"})


def test_details_hold_reason_field_and_time_to_retry() -> None:
    from mlxgui_grpc.services.interceptors import error_details

    error = errors.QueueFullError("full", field="sampling.n", retry_after_seconds=1.25, model="m")
    status = status_pb2.Status.FromString(error_details(error))
    assert (status.code, status.message) == (StatusCode.RESOURCE_EXHAUSTED.value[0], "full")
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    assert [detail.Unpack(kind) for detail, kind in zip(status.details, (info, bad, retry), strict=True)] == [
        True
    ] * 3
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", "mlxgui.v1", {"model": "m"})
    assert bad.field_violations[0].field == "sampling.n"
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 250_000_000)
