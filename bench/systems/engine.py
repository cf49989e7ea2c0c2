"""mlx-lm's BatchGenerator alone in a process: the limit that servers are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.driver import Driver, DriverError
from bench.machine import blas_environment
from bench.process_tree import Roles
from bench.systems.base import CannotRun, Running, Site


@dataclass
class RunningEngine:
    driver: Driver
    model: str
    roles: Roles = field(default_factory=lambda: Roles("engine"))
    endpoints: Mapping[str, str] = field(default_factory=lambda: {"engine": "in process"})
    root_pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.root_pid = self.driver.pid

    def own_driver(self) -> Driver | None:
        return self.driver

    def stop(self) -> None:
        self.driver.close()


class BareEngine:
    """Starts the engine; it is its own load generator, as there is nothing between the two."""

    def start(self, site: Site) -> Running:
        try:
            driver = Driver(
                "bench.load.engine",
                (str(site.model_folder),),
                blas_environment(site.environment),
                site.folder / "engine.log",
            )
        except DriverError as error:
            raise CannotRun(str(error)) from error
        return RunningEngine(driver, site.model)
