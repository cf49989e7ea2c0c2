"""Every option of a benchmark run, with its unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.workloads import Workload

SECTIONS = ("cells", "resources", "first-token", "unloaded")


@dataclass(frozen=True)
class BenchConfig:
    workloads: tuple[Workload, ...]
    targets: tuple[str, ...]
    client_counts: tuple[int, ...]
    sections: tuple[str, ...]
    repetitions: int
    # How often a cell is measured at most ...
    attempts: int
    # ... while more of the machine than this (0-1) was stolen by its host ...
    max_steal: float
    # ... or was used by processes that have no part in the cell.
    max_other_cpu: float
    # Single requests per target behind the added time to first token.
    first_token_requests: int
    unloaded_requests: int
    # How long every process is watched for idle CPU.
    idle_seconds: float
    spread_lengths: bool
    seed: int
    models_folder: Path
    results_folder: Path
    is_quick: bool
    # What child processes inherit; nothing else reads os.environ.
    environment: Mapping[str, str]
