"""Asks the model hub through child processes that stay warm for a while."""

import asyncio

from mlxgui_grpc import errors
from mlxgui_grpc.hub import check_access
from mlxgui_grpc.hub_child import library_environment
from mlxgui_grpc.hub_frames import Described, DescribeJob, Failed, Listed, LookupJob, Report, SearchJob
from mlxgui_grpc.hub_process import HubProcess, error_of

_CHILD = "mlxgui_grpc.hub_lookup"
MAX_CHILDREN = 3
"""Lookups that run at once; more wait."""
IDLE_SECONDS = 60.0
"""How long a child waits for its next lookup: its 60 MB are not worth more."""
GRACE_SECONDS = 2.0
"""How much later than its own limit a child that does not answer is killed."""


class HubLookups:
    """Lookups on the hub. Use on the event loop only; nothing blocks it.

    huggingface_hub lives in the children: its half second of imports and its parsing are nobody's pause here, and a
    lookup that hangs is ended by ending its process.
    """

    def __init__(
        self, *, endpoint: str | None, token: str | None, offline: bool, time_limit_seconds: float = 15.0
    ) -> None:
        """`endpoint` None is the public hub."""
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._token = token
        self._offline = offline
        self._time_limit_seconds = time_limit_seconds
        self._turns = asyncio.Semaphore(MAX_CHILDREN)
        self._idle: dict[HubProcess, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def search(self, words: str, tags: tuple[str, ...], sort: str, limit: int, cursor: str) -> Listed:
        """One page of the repositories that have these words in their id and all these tags.

        `sort` is created_at, downloads, last_modified or likes; the cursor is of the page before. Raises
        HubUnavailableError, HubRateLimitedError, HubAccessDeniedError.
        """
        report = await self._ask(
            SearchJob(
                words=words,
                tags=tags,
                sort=sort,
                limit=limit,
                cursor=cursor,
                endpoint=self._endpoint,
                token=self._token,
                time_limit_seconds=self._time_limit_seconds,
            )
        )
        assert isinstance(report, Listed), report
        return report

    async def describe(self, model_id: str) -> Described:
        """Everything about one repository; raises HubRepositoryNotFoundError too."""
        report = await self._ask(
            DescribeJob(
                model_id=model_id,
                endpoint=self._endpoint,
                token=self._token,
                time_limit_seconds=self._time_limit_seconds,
            )
        )
        assert isinstance(report, Described), report
        return report

    async def close(self) -> None:
        """End every child."""
        for child, timer in list(self._idle.items()):
            timer.cancel()
            self._retire(child)
        await asyncio.gather(*self._ending)

    async def _ask(self, job: LookupJob) -> Report:
        self._check()
        try:
            async with asyncio.timeout(self._time_limit_seconds + GRACE_SECONDS), self._turns:
                return await self._answer(job)
        except TimeoutError:
            raise errors.HubUnavailableError(
                "The hub did not answer in time; try again later.", endpoint=self._endpoint or ""
            ) from None

    def _check(self) -> None:
        if self._offline:
            raise errors.HubUnavailableError(
                "The hub cannot be asked: the server is offline (HF_HUB_OFFLINE); unset it and restart."
            )
        check_access(self._endpoint, self._token)

    async def _answer(self, job: LookupJob) -> Report:
        child = await self._take()
        is_sound = False
        try:
            child.send(job)
            report = await child.receive()
            if report is None:
                raise errors.HubUnavailableError(
                    f"The lookup was interrupted (its process ended with {await child.ending()}); try again."
                )
            is_sound = True
        finally:
            if is_sound:
                loop = asyncio.get_running_loop()
                self._idle[child] = loop.call_later(IDLE_SECONDS, self._retire, child)
            else:  # Late, dead, or about to answer somebody who has left: the next job must not get that answer.
                self._retire(child)
        if isinstance(report, Failed):
            raise error_of(report)
        return report

    async def _take(self) -> HubProcess:
        """A warm child, or a new one."""
        while self._idle:
            child, timer = self._idle.popitem()
            timer.cancel()
            if child.is_alive:
                return child
            self._retire(child)
        return await HubProcess.spawn(_CHILD, library_environment(self._endpoint))

    def _retire(self, child: HubProcess) -> None:
        self._idle.pop(child, None)
        task = asyncio.get_running_loop().create_task(child.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
