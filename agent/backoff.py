"""The one back-off: how long to wait before trying again."""

import random


def backoff_s(failures: int, *, rng: random.Random, first_s: float, last_s: float) -> float:
    """How long to wait after the n-th failure in a row: doubling from `first_s` to `last_s`, half of it random."""
    span_s = min(last_s, first_s * 2.0 ** min(failures - 1, 32))
    return span_s * rng.uniform(0.5, 1.0)
