"""The prompts: seeded, unique from their first word on, the same for every target."""

import random

WORDS = (
    "bal",
    "cor",
    "dan",
    "fel",
    "gis",
    "hor",
    "jun",
    "kal",
    "lem",
    "mir",
    "nos",
    "pel",
    "rin",
    "sor",
    "tal",
    "vas",
)


def prompt(seed: int, index: int, word_count: int) -> str:
    """The `index`-th prompt of a seed. It starts with its own word, so that no prefix cache can serve it."""
    rng = random.Random(seed * 1_000_003 + index)
    words = [f"{rng.randrange(16**6):06x}", *(rng.choice(WORDS) for _ in range(word_count - 1))]
    return " ".join(words)


def reply_length(seed: int, index: int, reply_tokens: int, *, is_spread: bool) -> int:
    """max_tokens of the `index`-th request: `reply_tokens`, or 0.5 to 1.5 times that."""
    if not is_spread:
        return reply_tokens
    return random.Random(seed * 7_919 + index).randint(reply_tokens // 2, reply_tokens * 3 // 2)
