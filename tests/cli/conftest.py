"""Commands for the session's server."""

import pytest

from tests.support_commands import CommandLine
from tests.support_server import RunningServer


@pytest.fixture
def commands(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> CommandLine:
    """Run in this process, for the session's server."""
    return CommandLine(server.home, monkeypatch, capfd)
