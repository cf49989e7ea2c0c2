"""Command line of the benchmark: flags to configuration, one run, the report on stdout."""

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

from bench.config import SECTIONS, BenchConfig
from bench.runner import Run
from bench.targets import TARGETS
from bench.workloads import CLIENT_COUNTS, QUICK_WORKLOADS, WORKLOADS, Workload

HERE = Path(__file__).resolve().parent


def configure(arguments: list[str]) -> BenchConfig:
    """The configuration that the flags ask for; exits with a usage message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare the server with its limit and its peers."
    )
    parser.add_argument(
        "--quick", action="store_true", help="micro only, 2 short repetitions: under 3 minutes"
    )
    parser.add_argument("--reps", type=int, help="repetitions (default 5; quick 2)")
    names = [*WORKLOADS, *(target.name for target in TARGETS), *map(str, CLIENT_COUNTS), *SECTIONS]
    parser.add_argument(
        "--only",
        default="",
        help=f"comma-separated models, targets, client counts or sections to do, of: {', '.join(names)}",
    )
    parser.add_argument("--seconds", type=float, help="shortest window of a cell (default 3 or 4; quick 1)")
    parser.add_argument(
        "--spread-lengths", action="store_true", help="replies of 0.5 to 1.5 times the length"
    )
    parser.add_argument(
        "--max-steal", type=float, default=0.10, help="share of CPU stolen above which a cell is repeated"
    )
    parser.add_argument("--max-other", type=float, default=0.15, help="share of CPU used by others, the same")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument(
        "--models", type=Path, default=HERE / ".models", help="cache folder of the built models"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the report and the JSON lines"
    )
    options = parser.parse_args(arguments)

    chosen = [word for word in options.only.split(",") if word]
    unknown = [word for word in chosen if word not in names and not word.isdigit()]
    if unknown:
        parser.error(f"--only does not know {', '.join(unknown)}; it knows {', '.join(names)}")
    table = QUICK_WORKLOADS if options.quick else WORKLOADS
    workloads = [workload for name, workload in table.items() if name in _chosen(chosen, list(table))]
    if options.seconds is not None:
        workloads = [_with_seconds(workload, options.seconds) for workload in workloads]
    clients = [int(word) for word in chosen if word.isdigit()]
    return BenchConfig(
        workloads=tuple(workloads),
        targets=tuple(_chosen(chosen, [target.name for target in TARGETS])),
        client_counts=tuple(clients) or CLIENT_COUNTS,
        sections=tuple(_chosen(chosen, list(SECTIONS))),
        repetitions=options.reps or (2 if options.quick else 5),
        attempts=1 if options.quick else 3,
        max_steal=options.max_steal,
        max_other_cpu=options.max_other,
        first_token_requests=12 if options.quick else 40,
        unloaded_requests=2 if options.quick else 5,
        idle_seconds=4.0 if options.quick else 15.0,
        spread_lengths=options.spread_lengths,
        seed=options.seed,
        models_folder=options.models,
        results_folder=options.out,
        is_quick=options.quick,
        environment=_environment(),
    )


def main() -> None:
    config = configure(sys.argv[1:])
    # Ended by a signal, it still ends every process that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        text, page = Run(config, HERE.parent).perform()
    except KeyboardInterrupt:
        sys.exit(130)
    print(text)
    print(f"Written to {page.parent}: {page.name} and {page.stem}.jsonl")


def _chosen(words: list[str], known: list[str]) -> list[str]:
    """Those of `known` that were named; all of them when none was."""
    return [name for name in known if name in words] or known


def _environment() -> dict[str, str]:
    """The harness's own without a preloaded BLAS: each system gets or chooses its own."""
    environment = dict(os.environ)
    if "openblas" in environment.get("LD_PRELOAD", ""):
        del environment["LD_PRELOAD"]
        environment.pop("OPENBLAS_NUM_THREADS", None)
    return environment


def _with_seconds(workload: Workload, seconds: float) -> Workload:
    return dataclasses.replace(workload, seconds=seconds)


if __name__ == "__main__":
    main()
