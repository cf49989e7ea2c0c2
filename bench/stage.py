"""The started systems of one model, with a client process for each kind of client."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from bench import machine, process_tree
from bench.driver import Driver, DriverError
from bench.process_tree import settle
from bench.protocol import Figures, Order
from bench.systems import SYSTEMS
from bench.systems.base import CannotRun, Running, Site
from bench.targets import BY_NAME, CLIENT_MODULES, Target
from bench.workloads import Workload

# Tokens of a request that is about its first one.
FIRST_TOKEN_REPLY = 8


@dataclass
class Stage:
    """Use it as a context manager: entering starts everything, leaving ends every process that it started."""

    workload: Workload
    names: Sequence[str]
    site_environment: dict[str, str]
    model_folder: Path
    seed: int
    notice: Callable[[str], None]
    running: dict[str, Running] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    _drivers: dict[str, Driver] = field(default_factory=dict)
    # Systems that did not start: their other targets need not try again.
    _failed: dict[str, CannotRun] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Stage":
        # A short path: the server's unix socket lies below it, and such a path has at most 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        try:
            for target in (BY_NAME[name] for name in self.names):
                self._add(target)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def system(self, target: Target) -> Running:
        return self.running[target.system]

    def driver(self, target: Target) -> Driver:
        return self.system(target).own_driver() or self._drivers[target.client]

    def order_once(self, target: Target, prompt_index: int, model: str | None = None) -> Order:
        """An order for one short request with the `prompt_index`-th prompt."""
        system = self.system(target)
        return Order(
            "once",
            system.endpoints[target.client],
            model or system.model,
            self.workload.prompt_words,
            FIRST_TOKEN_REPLY,
            self.seed,
            prompt_index,
            mode=target.mode,
        )

    def ask_once(self, target: Target, prompt_index: int) -> Figures:
        return self.driver(target).perform(self.order_once(target, prompt_index))

    def _add(self, target: Target) -> None:
        assert self._folder is not None
        folder = Path(self._folder.name)
        try:
            if target.system in self._failed:
                raise self._failed[target.system]
            if target.system not in self.running:
                self.notice(f"starting {target.system} with {self.workload.model}")
                site = Site(self.workload.model, self.model_folder, self.site_environment, folder)
                try:
                    self.running[target.system] = SYSTEMS[target.system].start(site)
                except CannotRun as error:
                    self._failed[target.system] = error
                    raise
            system = self.running[target.system]
            if system.own_driver() is None and target.client not in self._drivers:
                self._drivers[target.client] = Driver(
                    CLIENT_MODULES[target.client],
                    (),
                    self.site_environment,
                    folder / f"{target.client}-client.log",
                )
            # The first request loads the model, the second finds everything warm.
            for index in range(2):
                answer = self.ask_once(target, index)
                if answer.errors:
                    raise CannotRun(f"its first request failed: {'; '.join(answer.errors)}")
            settle([system.root_pid], quiet_seconds=0.5, limit_seconds=30)
            if system.own_driver() is None and target.system not in {t.system for t in self.targets}:
                self._compare_blas(target)
        except (CannotRun, DriverError) as error:
            self.notice(f"skipped {target.name}: {error}")
            return
        self.targets.append(target)

    def _compare_blas(self, target: Target) -> None:
        """Say so where OpenBLAS is here and the system does not use it: it is then not compared fairly."""
        if machine.openblas() is None:
            return
        system = self.system(target)
        tree = process_tree.sample(system.root_pid, system.roles)
        if not any(machine.uses_openblas(process.pid) for process in tree):
            self.notice(f"{target.system} runs without OpenBLAS, the bare engine with it")

    def _stop(self) -> None:
        for driver in self._drivers.values():
            driver.close()
        for system in self.running.values():
            system.stop()
        if self._folder is not None:
            self._folder.cleanup()
