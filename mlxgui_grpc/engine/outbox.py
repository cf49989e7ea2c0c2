"""Sends frames to the control process without ever making the MLX thread wait for it."""

import socket
import threading
from collections import deque

from mlxgui_grpc.engine import frames


class Outbox:
    """Frames in order. Any thread may `send`; what the socket does not take at once, a thread of its own sends.

    Nothing bounds the backlog but the requests themselves: the control process pauses the rows whose readers
    are slow long before, and when it stops reading altogether its watchdog, or its death, ends this process.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._backlog: deque[bytes] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._drain, name="outbox", daemon=True).start()

    def send(self, event: frames.Event) -> None:
        """Hand over one frame."""
        frame = frames.encode(event)
        with self._changed:
            if not self._backlog:
                # The common case costs one system call and no thread switch.
                try:
                    sent = self._connection.send(frame, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return  # The control process is gone; the reader thread ends this process.
                if sent == len(frame):
                    return
                frame = frame[sent:]
            self._backlog.append(frame)
            self._changed.notify()

    def flush(self) -> None:
        """Wait until everything is sent."""
        with self._changed:
            while self._backlog:
                self._changed.wait(0.1)

    def _drain(self) -> None:
        while True:
            with self._changed:
                while not self._backlog:
                    self._changed.wait()
                frame = self._backlog[0]
            try:
                self._connection.sendall(frame)
            except OSError:
                return
            with self._changed:
                self._backlog.popleft()
                self._changed.notify_all()
