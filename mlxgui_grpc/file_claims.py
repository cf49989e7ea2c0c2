"""Files of models that must stay: what an install has found is its own until the registry names it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from mlxgui_grpc.hub import Snapshot


class FileClaims:
    """The snapshots that running operations are about to register. Use on the event loop only."""

    def __init__(self) -> None:
        self.removing = asyncio.Lock()
        """Held by whoever removes files, from the decision that nobody needs them until they are gone."""
        self._claims: list[tuple[Path, str]] = []

    @contextlib.asynccontextmanager
    async def found(self, name: str, find: Callable[[], Awaitable[Snapshot]]) -> AsyncIterator[Snapshot]:
        """Find or fetch a snapshot for the model of that name; its files stay while the block runs."""
        while True:
            snapshot = await find()
            async with self.removing:
                if await asyncio.to_thread(
                    snapshot.path.is_dir
                ):  # Else it was being removed when it was found.
                    claim = (snapshot.path, name)
                    self._claims.append(claim)
                    break
        try:
            yield snapshot
        finally:
            self._claims.remove(claim)

    def names(self, path: Path) -> list[str]:
        """The models that are being installed from this folder."""
        return [name for claimed, name in self._claims if claimed == path]
