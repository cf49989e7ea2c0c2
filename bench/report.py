"""Writes the results for people: a Markdown page, also printed, that says first which goals are met."""

from collections.abc import Callable, Mapping, Sequence

from bench.cells import Cell
from bench.config import BenchConfig
from bench.goals import GOALS, Verdict
from bench.summary import Results, Spread
from bench.targets import BY_NAME


def render(
    results: Results, facts: Mapping[str, str], config: BenchConfig, load_range: tuple[float, float]
) -> str:
    """The whole report as Markdown."""
    sections = [
        "# Benchmark" + (" (quick: too short to judge by)" if config.is_quick else ""),
        _goals([goal.judge(results) for goal in GOALS]),
        *(_model(results, workload.model, config) for workload in config.workloads),
        _first_tokens(results),
        _unloaded(results),
        _uses(results),
        _conditions(results, facts, config, load_range),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _goals(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (
            verdict.goal.text,
            f"{verdict.goal.kind} {verdict.goal.bound:g} {verdict.goal.unit}".strip(),
            _spread(verdict.spread, 3 if verdict.goal.bound < 0.1 else 2),
            verdict.outcome,
        )
        for verdict in verdicts
    ]
    return "## Goals (micro)\n\n" + table(("goal", "bound", "figure [least-most]", "outcome"), rows)


def _model(results: Results, model: str, config: BenchConfig) -> str:
    tables = []
    for clients in config.client_counts:
        rows = [
            _row(results, model, name, clients) for name in config.targets if results.of(model, name, clients)
        ]
        if rows:
            head = (
                "target",
                "tokens/s [least-most]",
                "/ lock-step",
                "/ staggered",
                "/ mlx_lm.server",
                "CPU ms/token [least-most]",
                "of it",
                "TTFT p50 / p95 ms",
                "gap p95 ms",
                "TPOT p50 / p95 ms",
                "steal, other CPU",
                "n",
            )
            plural = "client" if clients == 1 else "clients"
            tables.append(f"### {model}, {clients} {plural}\n\n" + table(head, rows))
    failures = _failures(results, model)
    return "\n\n".join([*tables, *([failures] if failures else [])])


def _row(results: Results, model: str, name: str, clients: int) -> tuple[str, ...]:
    cells = results.of(model, name, clients)

    def spread(value: Callable[[Cell], float | None]) -> Spread | None:
        return Spread.of([value(cell) for cell in cells])

    def median(value: Callable[[Cell], float | None]) -> str:
        found = spread(value)
        return "-" if found is None else _number(found.median)

    roles = dict.fromkeys(role for cell in cells for role in cell.cpu_ms_by_role)
    parts = ", ".join(
        f"{role} {found.median:.2f}"
        for role in roles
        if (found := Spread.of([cell.cpu_ms_by_role.get(role) for cell in cells])) is not None
    )
    ratios = (
        "1" if base == name else _spread(results.throughput_ratio(model, name, base, clients), 2)
        for base in ("lock-step", "staggered", "mlx_lm")
    )
    return (
        BY_NAME[name].title,
        _spread(spread(lambda cell: cell.figures.tokens_per_second), 0 if model == "micro" else 1),
        *ratios,
        _spread(spread(lambda cell: cell.cpu_ms_per_token), 2),
        parts if len(roles) > 1 else "",
        f"{median(lambda cell: cell.figures.ttft_p50_ms)} / {median(lambda cell: cell.figures.ttft_p95_ms)}",
        median(lambda cell: cell.figures.itl_p95_ms),
        f"{median(lambda cell: cell.figures.tpot_p50_ms)} / {median(lambda cell: cell.figures.tpot_p95_ms)}",
        f"{median(lambda cell: cell.steal * 100)} %, {median(lambda cell: cell.other_cpu * 100)} %",
        str(len(cells)),
    )


def _failures(results: Results, model: str) -> str:
    lines = [
        f"- {cell.target}, {cell.clients} clients, repetition {cell.repetition}: {error} ({count} times)"
        for cell in results.cells
        if cell.model == model
        for error, count in cell.figures.errors.items()
    ]
    lines += [
        f"- {cell.target}, {cell.clients} clients, repetition {cell.repetition}: "
        f"{cell.figures.short_reply_count} replies of another length than asked for"
        for cell in results.cells
        if cell.model == model and cell.figures.short_reply_count
    ]
    return "" if not lines else "Cells with errors are left out of the tables.\n\n" + "\n".join(lines)


def _first_tokens(results: Results) -> str:
    rows = []
    for first in results.first_tokens:
        for name, times in first.ttft_ms.items():
            added = Spread.of(first.added_ms(name)) if name != "lock-step" else None
            title = "BatchGenerator alone" if name == "lock-step" else BY_NAME[name].title
            rows.append(
                (first.model, title, _spread(Spread.of(times), 1), _spread(added, 1), str(len(times)))
            )
    if not rows:
        return ""
    head = ("model", "target", "TTFT ms [least-most]", "added to the engine ms", "requests")
    return "## First token of a single request, same prompts in turn\n\n" + table(head, rows)


def _unloaded(results: Results) -> str:
    if not results.unloaded:
        return ""
    rows = [
        (
            start.model,
            BY_NAME[start.target].title,
            _spread(Spread.of(start.seconds), 3),
            _spread(Spread.of(start.loaded_seconds), 3),
            ", ".join(str(count) for count in start.standby_workers),
            start.error,
        )
        for start in results.unloaded
    ]
    head = ("model", "target", "unloaded: s to first token", "then loaded: s", "standby workers met", "error")
    return "## Chat to an unloaded model\n\n" + table(head, rows)


def _uses(results: Results) -> str:
    rows = [
        (use.model, use.system, process.role, f"{process.rss_mb:.0f}", f"{process.idle_cpu * 100:.2f} %")
        for use in results.uses
        for process in use.processes
    ]
    if not rows:
        return ""
    seconds = results.uses[0].idle_seconds
    head = ("with", "system", "process", "RSS MB", "idle CPU of a core")
    return f"## Processes at rest, watched for {seconds:g} s\n\n" + table(head, rows)


def _conditions(
    results: Results, facts: Mapping[str, str], config: BenchConfig, load_range: tuple[float, float]
) -> str:
    lines = [f"- {label}: {value}" for label, value in facts.items()]
    lines.append(
        f"- load average (1 minute), this benchmark included: {load_range[0]:.1f}-{load_range[1]:.1f}"
    )
    disturbed = sum(
        cell.steal > config.max_steal or cell.other_cpu > config.max_other_cpu for cell in results.cells
    )
    lines.append(
        f"- cells with over {config.max_steal:.0%} steal or {config.max_other_cpu:.0%} of the machine used "
        f"by others were measured up to {config.attempts} times; "
        f"{disturbed} of {len(results.cells)} stayed so"
    )
    lengths = "0.5-1.5 times the stated length" if config.spread_lengths else "equal length"
    for workload in config.workloads:
        lines.append(
            f"- {workload.model}: prompts of {workload.prompt_words} words, replies of "
            f"{workload.reply_tokens} tokens ({lengths}), greedy, windows of whole request cycles "
            f"and at least {workload.seconds:g} s"
        )
    lines += [
        f"- repetitions: {config.repetitions}, interleaved, order rotated; medians; "
        "ratios are paired inside a repetition",
        "- CPU is user + system time of every process of a target without the load generators, "
        "which share the machine with the servers",
        "- lock-step: all requests of a round inserted at once, the next round when all have ended; "
        "staggered: one ends and one is inserted at a time; both with mlx-lm's default batch sizes, "
        "tokenizing and detokenizing left out",
    ]
    lines += [f"- {notice}" for notice in results.notices]
    return "## Conditions\n\n" + "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable as plain text too."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def _spread(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    if spread.count == 1:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}-{spread.high:.{digits}f}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
