"""What could be installed: searches the hub for models that MLX runs, and says what they would take here."""

import asyncio
import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mlxgui_grpc import checkpoint, discovery_entry
from mlxgui_grpc.catalog import Catalog
from mlxgui_grpc.discovery_entry import Fit
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.hub import check_model_id
from mlxgui_grpc.hub_frames import Listed, Repository
from mlxgui_grpc.hub_lookups import HubLookups
from mlxgui_grpc.residency.budget import Budget
from mlxgui_grpc.timed_cache import TimedCache

KEPT_SECONDS = 60.0
KEPT_PAGES = 64
"""Pages of the hub, and descriptions, that are kept at most: some megabytes."""
DEFAULT_PAGE_SIZE = 20
MAX_PAGE_SIZE = 100
SCANNED_PAGES = 6
"""Pages of the hub, `MAX_PAGE_SIZE` models each, that one search for models that fit looks through at most."""
MAX_QUERY_CHARACTERS = 200
MAX_TOKEN_CHARACTERS = 4096
EMBEDDING_TAG = "feature-extraction"


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for."""

    words: str = ""
    sort: str = "downloads"
    """created_at, downloads, last_modified or likes."""
    is_embedding: bool = False
    max_memory_bytes: int | None = None
    """Only models that MLX loads and that take no more; 0: than what the machine has available. None: any."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A repository of the hub, and what it means here. None: not known, or not asked."""

    repository: Repository
    model_type: str
    is_loadable: bool
    estimated_memory_bytes: int | None
    installed_name: str
    memory_fit: bool | None = None
    fit: Fit | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Entries, and the token of those that follow; empty: none do."""

    entries: list[Entry]
    next_token: str


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a page begins: in the hub's page behind this cursor, after so many of its models."""

    cursor: str = ""
    index: int = 0


class Discovery:
    """The hub's catalogue, kept for a minute. Use on the event loop only."""

    def __init__(
        self,
        lookups: HubLookups,
        catalog: Catalog,
        budget: Budget,
    ) -> None:
        self._lookups = lookups
        self._catalog = catalog
        self._budget = budget
        self._pages: TimedCache[tuple[Any, ...], Listed] = TimedCache(KEPT_SECONDS, KEPT_PAGES)
        self._descriptions: TimedCache[str, Repository] = TimedCache(KEPT_SECONDS, KEPT_PAGES)

    async def close(self) -> None:
        """End what is asked."""
        await self._pages.close()
        await self._descriptions.close()
        await self._lookups.close()

    async def search(self, query: Query, page_size: int, page_token: str) -> Page:
        """One page of models that MLX runs; at most `page_size` (0: the default), fewer where few fit the memory.

        Raises InvalidRequestError, HubUnavailableError, HubRateLimitedError, HubAccessDeniedError.
        """
        _check(query, page_size)
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        position = _position(query, page_token)
        architectures = await _architectures()
        if query.max_memory_bytes is None:
            # Pages of the hub's are ours: nothing is left over of one.
            page = await self._listed(query, position.cursor, size)
            found = [self._entry(query, repository, architectures, None) for repository in page.repositories]
            return Page(found, _token(query, _Position(page.next_cursor)))
        budget = query.max_memory_bytes or self._budget.available_bytes()
        found = []
        for _ in range(SCANNED_PAGES):
            page = await self._listed(query, position.cursor, MAX_PAGE_SIZE)
            for index, repository in enumerate(page.repositories):
                if index < position.index:
                    continue
                entry = self._entry(query, repository, architectures, budget)
                if not (entry.memory_fit and entry.is_loadable):
                    continue
                if len(found) == size:
                    return Page(found, _token(query, _Position(position.cursor, index)))
                found.append(entry)
            position = _Position(page.next_cursor)
            if not page.next_cursor:
                break
        return Page(found, _token(query, position))

    async def show(self, model_id: str) -> Entry:
        """One repository, and whether this machine can run it; raises HubRepositoryNotFoundError too."""
        check_model_id(model_id, "id")

        async def ask() -> Repository:
            return (await self._lookups.describe(model_id)).repository

        repository = await self._descriptions.get(model_id, ask)
        architectures = await _architectures()
        is_loadable = discovery_entry.is_loadable(repository, architectures)
        required = self._required_bytes(repository)
        return Entry(
            repository=repository,
            model_type=discovery_entry.model_type(repository),
            is_loadable=is_loadable,
            estimated_memory_bytes=required,
            installed_name=self._installed_name(repository.id),
            fit=discovery_entry.fit(
                repository,
                is_loadable=is_loadable,
                refusal=discovery_entry.not_served(repository, architectures),
                required_bytes=required,
                available_bytes=self._budget.available_bytes(),
                hardware_error=self._budget.hardware_error,
            ),
        )

    async def _listed(self, query: Query, cursor: str, limit: int) -> Listed:
        tags = (discovery_entry.MLX, *((EMBEDDING_TAG,) if query.is_embedding else ()))
        key = (query.words, tags, query.sort, limit, cursor)
        return await self._pages.get(key, lambda: self._lookups.search(*key))

    def _entry(
        self,
        query: Query,
        repository: Repository,
        architectures: frozenset[str],
        budget_bytes: int | None,
    ) -> Entry:
        required = self._required_bytes(repository)
        is_known = budget_bytes is not None and required is not None
        return Entry(
            repository=repository,
            model_type=EMBEDDING_TAG if query.is_embedding else discovery_entry.model_type(repository),
            is_loadable=discovery_entry.is_loadable(repository, architectures),
            estimated_memory_bytes=required,
            installed_name=self._installed_name(repository.id),
            memory_fit=(required or 0) <= (budget_bytes or 0) if is_known else None,
        )

    def _required_bytes(self, repository: Repository) -> int | None:
        return discovery_entry.estimated_memory_bytes(repository, self._budget.process_bytes)

    def _installed_name(self, model_id: str) -> str:
        model = self._catalog.find(model_id)
        return model.name if model is not None else ""


async def _architectures() -> frozenset[str]:
    return await asyncio.to_thread(checkpoint.served_architectures)  # Reads files, the first time.


def _check(query: Query, page_size: int) -> None:
    if page_size < 0:
        raise InvalidRequestError("page_size must not be negative", field="page_size")
    if query.max_memory_bytes is not None and query.max_memory_bytes < 0:
        raise InvalidRequestError("max_memory_bytes must not be negative", field="max_memory_bytes")
    if len(query.words) > MAX_QUERY_CHARACTERS:
        raise InvalidRequestError(f"query is longer than {MAX_QUERY_CHARACTERS} characters", field="query")


def _token(query: Query, position: _Position) -> str:
    """The text of a position, bound to its query; empty for the beginning, which is after the end."""
    if position == _Position():
        return ""
    text = json.dumps([_digest(query), position.cursor, position.index])
    return base64.urlsafe_b64encode(text.encode()).decode()


def _position(query: Query, token: str) -> _Position:
    if not token:
        return _Position()
    try:
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise ValueError
        digest, cursor, index = json.loads(base64.urlsafe_b64decode(token))
        if digest != _digest(query) or not isinstance(cursor, str) or type(index) is not int or index < 0:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequestError(
            "page_token is none that this server gave for this search", field="page_token"
        ) from None
    return _Position(cursor, index)


def _digest(query: Query) -> str:
    return hashlib.sha256(repr(query).encode("utf-8", "replace")).hexdigest()[:16]
