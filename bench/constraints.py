"""What structured output costs: the engine with 8 streams that follow a JSON schema, and with 8 that do not.

``tools/openblas.sh python -m bench.constraints [--streams 8] [--reps 7]``

In one process, on the scheduler that a worker runs: both kinds in turn, the order swapped in every repetition, so that
what disturbs the machine disturbs both. Prefill and the compilation of the schema are outside the window. Greedy, the
same prompts, the same number of tokens, none of which ends a reply.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.make_models import SEED, build, is_built
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel, load_text_model
from mlxgui_grpc.engine.constraints import Grammars
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.guide import Guide
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.sampling import RowSampling
from mlxgui_grpc.engine.scheduler import Scheduler

HERE = Path(__file__).resolve().parent
PROMPT = "Write down the people of the village, their ages and whether they are at home. "
SCHEMA = {
    "type": "array",
    "minItems": 10_000,  # No reply of the benchmark can end.
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["old", "young", "tall"]}, "maxItems": 3},
            "at_home": {"type": "boolean"},
        },
        "required": ["name", "age", "tags", "at_home"],
        "additionalProperties": False,
    },
}
LEAD_STEPS = 4
"""Steps after the last row has joined and before the window: the lexer's first states are made in them."""


@dataclass(frozen=True)
class Window:
    """One measurement."""

    is_constrained: bool
    token_count: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def cpu_ms_per_token(self) -> float:
        return 1e3 * self.cpu_seconds / self.token_count

    @property
    def tokens_per_second(self) -> float:
        return self.token_count / self.wall_seconds


def measure(
    model: TextModel, grammars: Grammars, streams: int, steps: int, *, is_constrained: bool
) -> Window:
    """Decode `steps` tokens of every stream."""
    tokens = model.tokens
    sampling = frames.Sampling(max_tokens=steps + LEAD_STEPS + 8)
    constraint = frames.Constraint("json_schema", json.dumps(SCHEMA))
    ended: list[frames.Event] = []

    def receive(event: frames.Event) -> None:
        if isinstance(event, frames.Failed):
            ended.append(event)

    scheduler = Scheduler(model.model, end_tokens=tokens.end_tokens, max_rows=streams, send=receive)
    rows = []
    for key in range(streams):
        prompt = tokens.tokenizer.encode(f"{PROMPT} {key}")
        guide = (
            Guide(
                tokens.end_tokens,
                matcher=grammars.matcher(constraint),
                field="sampling.json_schema",
                mask_width=grammars.width,
            )
            if is_constrained
            else None
        )
        rows.append(
            EngineRow(
                key=key,
                prompt=prompt,
                sampling=RowSampling(sampling, model.defaults, key, prompt, tokens.vocabulary_size, guide),
                detokenizer=Detokenizer(tokens.backend, prompt[-8:]),
                stop=StopMatcher(()),
                token_limit=sampling.max_tokens,
            )
        )
    scheduler.submit(rows)
    while min(len(row.generated) for row in rows) < LEAD_STEPS:
        scheduler.turn()
    before = sum(len(row.generated) for row in rows)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        scheduler.turn()
    window = Window(
        is_constrained,
        sum(len(row.generated) for row in rows) - before,
        time.perf_counter() - wall,
        time.process_time() - cpu,
    )
    assert not ended and window.token_count == streams * steps, "every stream decodes in every step"
    return window


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.constraints", description=__doc__)
    parser.add_argument("--model", default="small-fp32", help="one that make_models builds")
    parser.add_argument(
        "--models", type=Path, default=HERE / ".models", help="cache folder of the built models"
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32, help="tokens of each stream in a window")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    folder = options.models / options.model
    if not is_built(folder, SEED):
        build(options.model, folder, SEED)
    model = load_text_model(folder)
    tokens = model.tokens
    grammars = Grammars(tokens.backend, tokens.vocabulary_size, tokens.end_tokens)
    windows: list[tuple[Window, Window]] = []  # (free, constrained)
    for repetition in range(-1, options.reps):  # The first is for caches and is not counted.
        order = (False, True) if repetition % 2 else (True, False)
        pair = {
            kind: measure(model, grammars, options.streams, options.steps, is_constrained=kind)
            for kind in order
        }
        if repetition >= 0:
            windows.append((pair[False], pair[True]))
    _report("CPU", "ms a token", [(a.cpu_ms_per_token, b.cpu_ms_per_token) for a, b in windows])
    _report("speed", "tokens/s", [(a.tokens_per_second, b.tokens_per_second) for a, b in windows])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"constraints-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    facts = {"model": options.model, "streams": options.streams, "steps": options.steps}
    path.write_text("".join(json.dumps(facts | asdict(w)) + "\n" for pair in windows for w in pair))
    print(f"Written to {path}")


def _report(title: str, unit: str, pairs: list[tuple[float, float]]) -> None:
    free, bound = (statistics.median(pair[kind] for pair in pairs) for kind in (0, 1))
    ratios = sorted(bound / free for free, bound in pairs)
    print(
        f"{title:6} {unit:11} free {free:8.2f}  with a schema {bound:8.2f}  ratio inside a repetition: "
        f"median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f} ({len(ratios)})"
    )


if __name__ == "__main__":
    main()
