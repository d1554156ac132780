"""Trains every method on every scenario and seed, some at a time, each on one thread."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iada.experiments.demo.scenarios import NUM_CLASSES, Split, make_split
from iada.experiments.demo.settings import HIDDEN, trainer_config
from iada.meta.step_result import MetaStep
from iada.models import mlp
from iada.training.trainer import Trainer

HISTOGRAM_BINS = 20  # of ε over (−1, 1)


@dataclass(frozen=True)
class Strengths:
    """What ε did in the last quarter of a Meta-IADA run.

    class_share: share of adversarial visits (ε > 0) of each class, (C). share_clean, share_flipped:
    the same for right and wrong labels, None without any. histogram_clean, histogram_flipped:
    visits in equal bins of ε over (−1, 1).
    """

    class_share: list[float]
    share_clean: float | None
    share_flipped: float | None
    histogram_clean: list[int]
    histogram_flipped: list[int]


@dataclass(frozen=True)
class Outcome:
    """One training run: test accuracy of each class, validation accuracy after each epoch."""

    scenario: str
    method: str
    seed: int
    class_accuracy: list[float]
    curve: list[float]
    strengths: Strengths | None


class StrengthLog:
    """Collects (sample, ε) of every visit; an `observe` callback of the trainer."""

    def __init__(self, first_epoch: int) -> None:
        self.first_epoch = first_epoch
        self.index: list[Tensor] = []
        self.epsilon: list[Tensor] = []

    def __call__(self, trainer: Trainer, batch: Sequence[Any], result: Any) -> None:
        if trainer.epoch < self.first_epoch or not isinstance(result, MetaStep):
            return
        if result.epsilon is not None:
            self.index.append(batch[2])
            self.epsilon.append(result.epsilon)

    def summary(self, split: Split) -> Strengths:
        """Shares and histograms over all visits seen."""
        index, epsilon = torch.cat(self.index), torch.cat(self.epsilon)
        labels, flipped = split.train.labels[index], split.flipped[index]
        adversarial = (epsilon > 0).double()

        def share(mask: Tensor) -> float | None:
            return float(adversarial[mask].mean()) if mask.any() else None

        def histogram(mask: Tensor) -> list[int]:
            return torch.histc(epsilon[mask], HISTOGRAM_BINS, -1, 1).long().tolist()

        by_class = [share(labels == c) or 0.0 for c in range(NUM_CLASSES)]
        return Strengths(
            by_class, share(~flipped), share(flipped), histogram(~flipped), histogram(flipped)
        )


def run_one(scenario: str, method: str, seed: int) -> Outcome:
    """Train one method once, in float64 and on one thread: the digits follow from the seed."""
    torch.set_num_threads(1)
    split = make_split(scenario, seed)
    config = trainer_config(scenario, method, seed)
    torch.manual_seed(seed)
    inputs = split.train.inputs.shape[1]
    backbone, head = mlp(inputs, HIDDEN, NUM_CLASSES, torch.float64)
    log = StrengthLog(config.epochs - config.epochs // 4)
    trainer = Trainer(
        backbone,
        head,
        split.with_meta() if method == "ce+meta" else split.train,
        split.meta,
        config,
        observe=log,
        validation_set=split.validation,
    )
    history = trainer.fit()
    return Outcome(
        scenario,
        method,
        seed,
        trainer.class_accuracy(split.test).tolist(),
        [record["accuracy"] for record in history],
        log.summary(split) if log.index else None,
    )


def run_all(jobs: Sequence[tuple[str, str, int]], workers: int | None = None) -> Iterator[Outcome]:
    """The outcomes of (scenario, method, seed) jobs, as they come, over `workers` processes."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        threads = torch.get_num_threads()
        for job in jobs:
            yield run_one(*job)
        torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(run_one, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Plain records, in the order of scenario, method and seed."""
    ordered = sorted(outcomes, key=lambda o: (o.scenario, o.method, o.seed))
    return [dataclasses.asdict(outcome) for outcome in ordered]
