"""Models and servers that only the tests over HTTP need."""

from collections.abc import Iterator

import grpc
import pytest

from tests.conftest import TinyModels
from tests.support_http import Series, installed_directory


@pytest.fixture(scope="session")
def series(channel: grpc.Channel) -> Series:
    """The metrics of the session's server."""
    return Series(channel)


@pytest.fixture(scope="session")
def endless_model(unix_channel: grpc.Channel, tiny_models: TinyModels) -> Iterator[str]:
    """A loaded model of the session's server that never ends by itself before its 32,768 tokens are full."""
    with installed_directory(unix_channel, tiny_models.long, "endless") as name:
        yield name
