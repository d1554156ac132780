"""How far a series of runs is, and about how long the rest takes."""

import dataclasses
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from iada.experiments.metrics import METRICS
from iada.experiments.recipe import MethodEntry, Recipe
from iada.experiments.report.variants import tested_on
from iada.methods.options import BilevelOptions
from iada.training.config import TrainerConfig
from iada.training.first_phase import can_share, first_phase_config

META_STEP = 3.6  # in plain steps, by docs/training.md's passes; "head" has no third backward, no ḣ
HEAD_META_STEP = 1.7


class Series:
    """The runs of one command, in their order.

    The time left is that of the runs made so far in proportion to epochs, an epoch with meta steps
    counting several times: rough, and None before the first run is made.
    """

    def __init__(self, runs: Sequence[tuple[Recipe, MethodEntry, int]]) -> None:
        shared: set[Any] = set()
        self.costs = [self._cost(*run, shared) for run in runs]
        self.begun = 0
        self._made_cost, self._made_seconds, self._start = 0.0, 0.0, 0.0

    def begin(self) -> str:
        """Called before each run; "run 3 of 18"."""
        self.begun += 1
        self._start = time.monotonic()
        return f"run {self.begun} of {len(self.costs)}"

    def outlook(self) -> str:
        """The time left of all runs that have not begun; empty until it is known."""
        left = self.seconds_left()
        return f", about {timedelta(seconds=round(left))} left in all" if left else ""

    def end(self, record: dict[str, Any], recipe: Recipe, made: bool) -> str:
        """Called after each run; what came of it, and the time left. made: or was there before."""
        if made:
            self._made_cost += self.costs[self.begun - 1]
            self._made_seconds += time.monotonic() - self._start
        metric = recipe.metrics[0]
        value = record["last"].get(metric)
        shown = "–" if value is None else f"{100 * value:.2f}"
        words = [f"{METRICS[metric]} {shown} on the {tested_on(record)} set at the last epoch"]
        left = self.seconds_left()
        if left:
            words.append(f"about {timedelta(seconds=round(left))} left")
        return ", ".join(words)

    def seconds_left(self) -> float | None:
        """Of the runs that have not begun."""
        if not self._made_cost:
            return None
        return self._made_seconds / self._made_cost * sum(self.costs[self.begun :])

    @staticmethod
    def _cost(recipe: Recipe, entry: MethodEntry, seed: int, shared: set[Any]) -> float:
        """In epochs of plain training."""
        config = dataclasses.replace(entry.trainer, seed=seed)
        first = float(config.ce_epochs)
        if can_share(config):
            key = (recipe.name, entry.with_meta, repr(first_phase_config(config)))
            if key in shared:
                first = 0.0
            shared.add(key)
        return first + (config.epochs - config.ce_epochs) * _step_cost(config)


def _step_cost(config: TrainerConfig) -> float:
    """Of a step of the method, in plain ones."""
    method = config.method
    if not isinstance(method, BilevelOptions) or not method.meta_learns:
        return 1.0
    cost = HEAD_META_STEP if method.scope == "head" else META_STEP
    return 1 + (cost - 1) / method.interval
