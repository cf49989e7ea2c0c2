"""What a server that may be killed has acknowledged: for each thing the states that it may be in afterwards."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import grpc

from tests.support_calls import failure_of


class Ledger:
    """The possible states of each thing: one when its last write was answered, more while answers are missing.

    None is the state of what was never written. One thread writes to one thing at a time.
    """

    def __init__(self) -> None:
        self._possible: defaultdict[str, set[Any]] = defaultdict(lambda: {None})
        self.acknowledged: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self.operations: dict[str, bool] = {}
        """Ids that clients have seen, and whether they saw the operation succeed."""

    @contextlib.contextmanager
    def writing(self, thing: str, state: Any) -> Iterator[None]:
        """The block asks the server to bring a thing into that state, and returns when it said yes."""
        before = set(self._possible[thing])
        self._possible[thing] = before | {state}
        try:
            yield
        except grpc.RpcError as error:
            if failure_of(error).reason:  # An answer; without one it may have happened.
                self._possible[thing] = before
            else:
                self.unanswered[thing] += 1
            raise
        self._possible[thing] = {state}
        self.acknowledged[thing] += 1

    def find(self, thing: str, state: Any) -> None:
        """A server that started since has it in that state: a possible one, and the only one from now on."""
        assert state in self._possible[thing], (
            f"{thing} is {state!r}; acknowledged: {self._possible[thing]!r}"
        )
        self._possible[thing] = {state}

    def things(self) -> set[str]:
        """All that anything was ever written to."""
        return set(self._possible)
