"""Interleaved timing: the sides take turns, so that a machine's drift hits them alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = 0.02,
    budget: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call of each side in each round, after one warm-up call each.

    A side is called as often in a round as fills about `seconds`, and at least once. Fewer rounds,
    but three at least, where they would take longer than `budget` seconds. `clock` may be
    `time.process_time` for sides of one thread on a machine that does other work too.
    """
    repeats, once = {}, 0.0
    for name, call in sides.items():
        start = clock()
        call()
        spent = clock() - start
        repeats[name] = max(1, round(seconds / spent))
        once += repeats[name] * spent
    rounds = max(3, min(rounds, round(budget / once)))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            taken[name].append((clock() - start) / repeats[name])
    return taken


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
