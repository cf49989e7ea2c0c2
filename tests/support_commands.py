"""Runs commands of `mlxgui`: here, which is quick, in a process of their own, or at a terminal."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxgui_grpc.__main__ import main
from tests.support_server import clean_environment

COMMAND_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class CommandLine:
    """The command line in this process, for the server of a home: a process of its own takes a second."""

    def __init__(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.home = home
        self._monkeypatch = monkeypatch
        self._capture = capture

    def run(self, *arguments: str) -> Outcome:
        """Run one command; stdin is empty, and is no terminal."""
        with self._monkeypatch.context() as patch, open(os.devnull) as nothing:
            for name in os.environ:
                if name.startswith(("MLX_GUI_", "HF_")):
                    patch.delenv(name)
            patch.setenv("MLX_GUI_HOME", str(self.home))
            patch.setenv("COLUMNS", "200")
            patch.setattr(sys, "stdin", nothing)
            patch.setattr(sys, "argv", ["mlxgui", *arguments])
            self._capture.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        code = ended.value.code
        assert isinstance(code, int)
        return Outcome(code, *self._capture.readouterr())

    def succeed(self, *arguments: str) -> str:
        """The stdout of a command that must exit with 0."""
        outcome = self.run(*arguments)
        assert outcome.returncode == 0, (arguments, outcome)
        return outcome.stdout

    def refuse(self, exit_code: int, *arguments: str) -> str:
        """The one sentence of a command that must fail so, without the program's name."""
        return sentence(self.run(*arguments), exit_code)


def environment_of(home: Path, **more: str) -> dict[str, str]:
    return {**clean_environment(), "MLX_GUI_HOME": str(home), **more}


def mlxgui(
    home: Path, *arguments: str, stdin: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run one command for the server of a home, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mlxgui_grpc", *arguments],
        env=environment_of(home, **environment),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


def sentence(result: "Outcome | subprocess.CompletedProcess[str]", exit_code: int) -> str:
    """The one line that a refusal consists of."""
    assert result.returncode == exit_code, (result.stdout, result.stderr)
    assert result.stdout == ""
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("mlxgui: ") and "Traceback" not in result.stderr
    return line


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            environment = environment_of(home, TERM="xterm", COLUMNS="100")
            os.execve(sys.executable, [sys.executable, "-m", "mlxgui_grpc", *arguments], environment)
        self.seen = ""

    def expect(self, words: str) -> None:
        """Read until the words have been written; they are taken from what was seen."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while words not in self.seen:
            assert time.monotonic() < deadline, f"never said {words!r}: {self.seen!r}"
            ready, _, _ = select.select([self._fd], [], [], 1.0)
            if ready:
                try:
                    self.seen += os.read(self._fd, 65536).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended without {words!r}: {self.seen!r}") from None
        self.seen = self.seen.partition(words)[2]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def takes_lines(self) -> bool:
        """Whether the terminal gives what is typed line by line, as a shell wants to find it."""
        return bool(termios.tcgetattr(self._fd)[3] & termios.ICANON)

    def wait(self) -> int:
        """Read to the end; the exit code."""
        with contextlib.suppress(OSError):
            while data := os.read(self._fd, 65536):
                self.seen += data.decode("utf-8", "replace")
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)
