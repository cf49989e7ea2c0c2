"""Carries a run out: every model in turn, its cells interleaved over the targets, results written at once."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench import cells, first_token, machine, make_models, report, resources
from bench.cells import Cell
from bench.config import BenchConfig
from bench.driver import DriverError
from bench.goals import GOALS
from bench.stage import Stage
from bench.summary import Results
from bench.targets import BY_NAME
from bench.workloads import Workload

BUILD_LIMIT_SECONDS = 600.0


@dataclass
class Run:
    """One benchmark run; `perform` returns its Markdown report and leaves it beside the JSON lines."""

    config: BenchConfig
    repository: Path
    results: Results = field(default_factory=Results)
    _loads: list[float] = field(default_factory=list)
    _lines: TextIO | None = None

    def perform(self) -> tuple[str, Path]:
        """Measure everything that the configuration asks for. Returns the report and its file."""
        self.config.results_folder.mkdir(parents=True, exist_ok=True)
        name = time.strftime("%Y%m%d-%H%M%S") + ("-quick" if self.config.is_quick else "")
        facts = machine.facts(self.repository)
        with (self.config.results_folder / f"{name}.jsonl").open("w") as self._lines:
            self._record("machine", facts)
            for workload in self.config.workloads:
                self._measure(workload)
            for goal in GOALS:
                self._record("goal", goal.judge(self.results).to_json())
        text = report.render(self.results, facts, self.config, (min(self._loads), max(self._loads)))
        page = self.config.results_folder / f"{name}.md"
        page.write_text(text)
        return text, page

    def _measure(self, workload: Workload) -> None:
        folder = self._model(workload.model)
        environment = {**self.config.environment, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        stage = Stage(workload, self.config.targets, environment, folder, self.config.seed, self._notice)
        with stage:
            for section, measure in (
                ("resources", self._measure_resources),
                ("first-token", self._measure_first_token),
                ("cells", self._measure_cells),
                ("unloaded", self._measure_unloaded),
            ):
                if section not in self.config.sections:
                    continue
                try:
                    measure(stage)
                except DriverError as error:
                    self._notice(f"{section} of {workload.model} was given up: {error}")

    def _measure_resources(self, stage: Stage) -> None:
        self._say(f"{stage.workload.model}: watching idle processes for {self.config.idle_seconds:g} s")
        uses = resources.measure(stage, self.config.idle_seconds)
        self.results.uses += uses
        for use in uses:
            self._record("resources", use.to_json())

    def _measure_first_token(self, stage: Stage) -> None:
        self._say(f"{stage.workload.model}: {self.config.first_token_requests} single requests per target")
        first = first_token.measure(stage, self.config.first_token_requests)
        self.results.first_tokens.append(first)
        self._record("first-token", first.to_json())

    def _measure_unloaded(self, stage: Stage) -> None:
        # The demo model is the same whatever model the cells use.
        if stage.workload is not self.config.workloads[0]:
            return
        self._say("chats to the unloaded demo model")
        starts = first_token.measure_unloaded(stage, self.config.unloaded_requests)
        self.results.unloaded += starts
        for start in starts:
            self._record("unloaded", start.to_json())

    def _measure_cells(self, stage: Stage) -> None:
        for target in stage.targets:
            cells.warm_up(stage, target, self.config)
        for repetition in range(self.config.repetitions):
            for clients in self.config.client_counts:
                turn = repetition % max(1, len(stage.targets))
                for target in stage.targets[turn:] + stage.targets[:turn]:
                    try:
                        attempts = cells.measure(stage, target, clients, repetition, self.config)
                    except DriverError as error:
                        # Its process is gone; the others go on without it.
                        self._notice(f"{target.name} was given up at {clients} clients: {error}")
                        stage.targets.remove(target)
                        continue
                    for cell in attempts:
                        self._record("cell", {**cell.to_json(), "is_used": cell is attempts[-1]})
                    self.results.cells.append(attempts[-1])
                    self._say(_line(attempts[-1]))

    def _model(self, name: str) -> Path:
        folder = self.config.models_folder / name
        if not make_models.is_built(folder, make_models.SEED):
            self._say(f"building {name}")
            # In a process of its own: the harness must not carry MLX while it measures.
            subprocess.run(
                [sys.executable, "-m", "bench.make_models", str(self.config.models_folder), "--only", name],
                check=True,
                env=machine.blas_environment(self.config.environment),
                timeout=BUILD_LIMIT_SECONDS,
            )
        return folder.resolve()

    def _notice(self, text: str) -> None:
        self._say(text)
        if not text.startswith("starting"):
            self.results.notices.append(text)
            self._record("notice", {"text": text})

    def _record(self, kind: str, value: dict[str, Any] | dict[str, str]) -> None:
        assert self._lines is not None
        self._loads.append(os.getloadavg()[0])
        self._lines.write(json.dumps({"kind": kind, **value}) + "\n")
        self._lines.flush()

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _line(cell: Cell) -> str:
    figures = cell.figures
    ttft = "-" if figures.ttft_p50_ms is None else f"{figures.ttft_p50_ms:.0f}/{figures.ttft_p95_ms:.0f}"
    cpu = "-" if cell.cpu_ms_per_token is None else f"{cell.cpu_ms_per_token:.3f}"
    errors = f" errors {figures.errors}" if figures.errors else ""
    return (
        f"{cell.model} {BY_NAME[cell.target].title:26} x{cell.clients:<3} rep {cell.repetition} "
        f"{figures.tokens_per_second:8.1f} tok/s  CPU {cpu} ms/tok  TTFT {ttft} ms  "
        f"steal {cell.steal:.0%} other {cell.other_cpu:.0%} load {cell.load_average:.1f}{errors}"
    )
