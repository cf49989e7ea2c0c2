"""Entry point of a worker: `python -m mlxgui_grpc.engine.worker --fd N`, where N is its end of a socketpair.

Imports nothing heavy until it watches that socket: MLX and mlx-lm take seconds to import, and a control process that
dies meanwhile must not leave this one behind.
"""

import argparse
import os
import select
import signal
import socket
import threading
import traceback


def main() -> None:
    """Run a worker until its socket closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU, whatever the machine has")
    arguments = parser.parse_args()
    connection = socket.socket(fileno=arguments.fd)
    # This process ends when the control process says so, not by a Ctrl-C that was meant for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process: see prompts.py
    threading.Thread(target=_end_with, args=(connection,), name="parent-watch", daemon=True).start()

    _try_mlx(connection, use_gpu=not arguments.cpu)
    from mlxgui_grpc.engine import runtime, warm_up

    warm_up.leave_wired_limit_alone()
    warm_up.use_device(use_gpu=not arguments.cpu)
    try:
        runtime.Worker(connection).run()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # Daemon threads of libraries have nothing left to say.


def _try_mlx(connection: socket.socket, *, use_gpu: bool) -> None:
    """Import MLX and compute; where that fails, say why and end."""
    from mlxgui_grpc.engine import frames
    from mlxgui_grpc.errors import HardwareIncompatibleError

    try:
        import mlx.core as mx

        if not use_gpu:
            mx.set_default_device(mx.cpu)
        mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    except Exception as error:
        traceback.print_exc()
        why = HardwareIncompatibleError.of(f"{type(error).__name__}: {error}")
        connection.sendall(frames.encode(frames.Failed((), why.reason, why.message)))
        os._exit(1)


def _end_with(connection: socket.socket) -> None:
    """End the process when the other end of the socket is closed."""
    poll = select.poll()
    poll.register(connection, 0)  # hang-up is always reported; data is the reader's business
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll()):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
