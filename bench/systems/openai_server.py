"""A peer: any server that is one command and streams OpenAI chat completions."""

import sys
from dataclasses import dataclass

from bench.machine import blas_environment
from bench.process_tree import Roles
from bench.systems.base import CannotRun, Running, RunningServer, Site, free_port, spawn, wait_for_http


@dataclass(frozen=True)
class OpenAIServer:
    """`command` may name {python}, {model} (the model's folder) and {port}."""

    command: tuple[str, ...]
    ready_path: str
    process_name: str
    # The interpreter of the peer's own environment; None is the one that runs the harness.
    python: str | None = None

    def start(self, site: Site) -> Running:
        port = free_port()
        values = {"python": self.python or sys.executable, "model": str(site.model_folder), "port": str(port)}
        log = site.folder / f"{self.process_name}.log"
        try:
            process = spawn(
                [part.format(**values) for part in self.command], blas_environment(site.environment), log
            )
        except OSError as error:
            raise CannotRun(f"it does not start: {error}") from error
        address = f"http://127.0.0.1:{port}"
        wait_for_http(address + self.ready_path, process, log)
        return RunningServer(
            process, Roles(self.process_name), {"sse": f"{address}/v1"}, str(site.model_folder)
        )
