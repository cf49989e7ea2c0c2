"""Named places where a test lets the process die or the disk fail; inert unless the entry of the process arms one.

A failpoint is armed by `NAME:ACTION` or `NAME:ACTION:N`, and acts when NAME is passed for the N-th time (default: the
first). Actions: `kill` ends this process as kill -9 does, `crash` the control process with it; that time and from then
on, `eio` and `enospc` raise what a broken or a full disk would, and `pause` takes half a second.
"""

import errno
import itertools
import os
import signal
import time
from dataclasses import dataclass, field

ENVIRONMENT = "MLX_GUI_FAILPOINT"

PAUSE_SECONDS = 0.5

_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


@dataclass(slots=True)
class _Armed:
    name: str
    action: str
    number: int
    control_pid: int
    passed: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def strike(self) -> None:
        if next(self.passed) < self.number:
            return
        if self.action in _ERRORS:
            number = _ERRORS[self.action]
            raise OSError(number, os.strerror(number))
        if self.action == "pause":
            time.sleep(PAUSE_SECONDS)
            return
        if self.action == "crash":
            os.kill(self.control_pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


_armed: _Armed | None = None


def arm(text: str, control_pid: int) -> None:
    """Arm the failpoint that `text` names; none when it is empty. Called once, by the entry of a process."""
    global _armed
    if not text:
        _armed = None
        return
    name, _, order = text.partition(":")
    action, _, number = order.partition(":")
    if action not in ("kill", "crash", "pause", *_ERRORS):
        raise ValueError(f"{ENVIRONMENT}: '{action}' is no action")
    _armed = _Armed(name, action, int(number or "1"), control_pid)


def failpoint(name: str) -> None:
    """Pass the place of that name."""
    if _armed is not None and _armed.name == name:
        _armed.strike()
