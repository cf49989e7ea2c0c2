"""The requests that are open on a worker: where their events go, what is still owed to them, how fast they get on."""

import asyncio
from collections.abc import Callable

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.mailbox import Mailbox
from mlxgui_grpc.engine.stall import StallWatch
from mlxgui_grpc.engine.token_rate import TokenRate
from mlxgui_grpc.errors import BY_REASON, ModelServerError


class Call:
    """One request on a worker. Leaving the block, however, gives its rows back at the next step."""

    def __init__(self, keys: tuple[int, ...], mailbox: Mailbox, give_back: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._give_back = give_back
        self.keys = keys
        self.take = mailbox.take
        """Await the events that wait; raises the error that ended the request."""
        self.fail = mailbox.fail
        """End the request with an error of the caller's."""

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        self._mailbox.close()
        self._give_back()


class OpenCalls:
    """Rows and questions by key. Ends each exactly once. Use on the event loop only."""

    def __init__(self, send: Callable[[frames.Command], None], stall: StallWatch) -> None:
        """`send` takes a command for the worker, or drops it when there is none any more."""
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._stall = stall
        self._mailboxes: dict[int, Mailbox] = {}
        self._waiting: set[int] = set()  # rows that nothing was delivered for yet
        self._asked_once: set[int] = set()
        self._rate = TokenRate()

    def __len__(self) -> int:
        return len(self._mailboxes)

    @property
    def waiting_count(self) -> int:
        """Rows of which nothing has come yet."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Rows of which something has come and more is to come."""
        return len(self._mailboxes) - len(self._waiting) - len(self._asked_once)

    @property
    def tokens_per_second(self) -> float:
        """Tokens delivered lately."""
        return self._rate.per_second(self._loop.time())

    def open(self, keys: tuple[int, ...], *, is_answered_once: bool = False) -> Call:
        """Expect events for these keys."""

        def pause() -> None:
            for key in self._still_open(keys):
                self._send(frames.Pause(key))
                self._stall.paused(key)

        def resume() -> None:
            for key in self._still_open(keys):
                self._send(frames.Resume(key))
                self._stall.resumed(key)

        mailbox = Mailbox(pause=pause, resume=resume, abandon=lambda: self.cancel(keys))
        for key in keys:
            self._mailboxes[key] = mailbox
        (self._asked_once if is_answered_once else self._waiting).update(keys)
        self._stall.asked(keys)
        return Call(keys, mailbox, lambda: self.cancel(keys))

    def cancel(self, keys: tuple[int, ...]) -> None:
        """Forget calls that nobody waits for any more, and tell the worker."""
        open_keys = tuple(self._still_open(keys))
        for key in open_keys:
            self._close(key)
        if open_keys:
            self._send(frames.Cancel(open_keys))

    def deliver(self, step: frames.Step) -> None:
        """Hand the pieces of a step to their requests."""
        mailboxes, waiting = self._mailboxes, self._waiting
        token_count = 0
        for piece in step.pieces:
            token_count += piece.token_count
            mailbox = mailboxes.get(piece.key)
            if mailbox is not None:
                mailbox.put(piece)
                if waiting:
                    waiting.discard(piece.key)
                if piece.finish:
                    self._close(piece.key)
        self._rate.add(self._loop.time(), token_count)
        self._stall.progressed()

    def receive(self, event: frames.Accepted | frames.Prefilled | frames.Answer) -> None:
        """Hand over what came for one request."""
        if isinstance(event, frames.Answer):
            self._stall.answered((event.key,))
            if mailbox := self._close(event.key):
                mailbox.put(event)
            return
        if isinstance(event, frames.Accepted):
            self._stall.accepted(event.keys, tuple(self._still_open(event.keys)))
        else:
            self._waiting.difference_update(event.keys)
            self._stall.progressed()
        if mailbox := self._mailboxes.get(event.keys[0]):
            mailbox.put(event)

    def fail(self, event: frames.Failed) -> None:
        """End the calls that the worker failed."""
        self._stall.answered(event.keys)
        self._stall.progressed()
        for key in event.keys:
            if mailbox := self._close(key):
                mailbox.fail(BY_REASON[event.reason](event.message, field=event.field))

    def end(self, error: ModelServerError) -> None:
        """End every call: the worker is gone."""
        mailboxes = set(self._mailboxes.values())
        self._mailboxes.clear()
        self._waiting.clear()
        self._asked_once.clear()
        self._stall.close()
        for mailbox in mailboxes:
            mailbox.fail(error)

    def _still_open(self, keys: tuple[int, ...]) -> list[int]:
        return [key for key in keys if key in self._mailboxes]

    def _close(self, key: int) -> Mailbox | None:
        mailbox = self._mailboxes.pop(key, None)
        if mailbox is not None:
            self._waiting.discard(key)
            self._asked_once.discard(key)
            self._stall.closed(key)
        return mailbox
