"""What a server leaves to itself when it restarts in the same process."""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Collection, MutableMapping
from typing import NoReturn

import msgspec
import psutil

log = logging.getLogger(__name__)

CHILDREN_SECONDS = 5.0

_VARIABLE = "MLX_GUI_HANDOVER"


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """It lies in the environment of the next program only: a process that is killed on the way leaves nothing."""

    process_id: int
    lock: int
    """Descriptor of the state folder's lock, which is never let go."""
    rest_port: int
    """Where the REST API was: the next one takes the same where any would do."""
    grpc_port: int
    models: tuple[str, ...]
    """Names of the models that were in memory."""


def take_handover(environ: MutableMapping[str, str]) -> Handover | None:
    """What the program before this one left to it in this process, if there was one; taken out of `environ`."""
    try:
        handover = msgspec.json.decode(environ.pop(_VARIABLE, ""), type=Handover)
    except msgspec.DecodeError:
        return None
    # A child that inherited it is not meant.
    return handover if handover.process_id == os.getpid() else None


def present_children() -> frozenset[psutil.Process]:
    """The children of this process, at its start those of a program before: `sh -c 'x & exec mlxgui serve'`."""
    return frozenset(psutil.Process().children())


async def end_children(spared: Collection[psutil.Process] = ()) -> None:
    """End every child process there may still be with all of its own, but for the spared ones, and wait for it: the
    next program knows none of them."""
    deadline = time.monotonic() + CHILDREN_SECONDS
    children: list[psutil.Process] = []
    for child in psutil.Process().children():
        if child not in spared:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += [child, *child.children(recursive=True)]
    for child in children:
        log.info("process %d is still there before the restart: killed", child.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


def start_again(handover: Handover) -> NoReturn:
    """Become the same command line once more, in this process; raises OSError when that cannot be started."""
    os.set_inheritable(handover.lock, True)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, _VARIABLE: msgspec.json.encode(handover).decode()}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
