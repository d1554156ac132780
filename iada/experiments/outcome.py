"""What a trained classifier amounts to, for a run's record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iada.experiments.datasets import Labelled
from iada.experiments.diagnostics import TermsLog, spectrum, surrogate_gap
from iada.experiments.epsilon_log import EpsilonLog
from iada.experiments.metrics import LOWER_IS_BETTER, Measured, measure
from iada.experiments.recipe import Recipe
from iada.experiments.scenarios import Split
from iada.meta.learner import detached
from iada.training.label_issues import detection
from iada.training.trainer import Trainer
from iada_kernels.contract import LossInputs

MOST_EIGENVALUES = 6400  # kept in a record: all of 100 classes with 64 features
GAP_ROWS = 500  # training samples that the surrogate is checked on


def measured_on(
    trainer: Trainer, view: Dataset, data: Labelled, split: Split, trusted: bool = True
) -> Measured:
    """Every metric on a part of the split, `view` being how the trainer sees it.

    trusted: whether training labels are right as far as is known, so that their counts say which
    classes are rare.
    """
    outputs = trainer.outputs(view)
    groups: dict[str, Any] = {}
    if data.groups is not None and split.train.groups is not None:
        counts = split.train.group_counts()
        groups = {"groups": data.groups, "group_names": data.group_names, "group_counts": counts}
    measured = measure(outputs.logits.float(), outputs.labels, split.train.class_counts(), **groups)
    # Where labels are wrong so are their counts, and no class is rare by them.
    if split.wrong is not None or not trusted:
        shots = dict.fromkeys(("many", "medium", "few"))
        measured = measured._replace(metrics={**measured.metrics, **shots})
    if data.members is None:
        return measured
    hit = outputs.logits.argmax(dim=1) == outputs.labels  # WILDS: groups that overlap
    accuracy = {
        name: float(hit[member].double().mean()) if member.any() else None
        for name, member in zip(data.member_names, data.members.T, strict=True)
    }
    worst = min(value for value in accuracy.values() if value is not None)
    metrics = {**measured.metrics, "worst_group": worst, "weighted_average": None}
    return measured._replace(metrics=metrics, group_accuracy=accuracy)


def last_and_best(
    history: Sequence[Mapping[str, Any]], recipe: Recipe, last: Measured
) -> dict[str, Any]:
    """The last epoch and the best: by the validation set where the protocol has one, else, as
    several published tables have it, by the test set."""
    judge = judge_of(recipe, history)
    best = max(history, key=lambda row: goodness(judge, row.get(judge)))
    test = {name.removeprefix("test_"): v for name, v in best.items() if name.startswith("test_")}
    return {"last": last.metrics, "best": test, "best_epoch": best["epoch"], "best_by": judge}


def goodness(judge: str, value: float | None) -> float:
    """The larger the better, of what `judge_of` names; least where it was not measured."""
    if value is None:
        return -math.inf
    return -value if judge.partition("_")[2] in LOWER_IS_BETTER else value


def judge_of(recipe: Recipe, history: Sequence[Mapping[str, Any]]) -> str:
    """What the best epoch is chosen by, as the history names it."""
    metric = recipe.metrics[-1] if "worst_group" in recipe.metrics else recipe.metrics[0]
    validated = any(f"validation_{metric}" in row for row in history)
    return f"validation_{metric}" if validated else f"test_{metric}"


def curve(history: Sequence[Mapping[str, Any]], terms: TermsLog) -> list[dict[str, Any]]:
    """One dict an epoch: loss, accuracy, how far Eq. 9 moved Σ, and the terms of Table 1.

    The latter two where there is a Σ that learns, and where the terms were looked at.
    """
    by_epoch = {row["epoch"]: row for row in terms.summary()}
    points = []
    for row in history:
        point = {"epoch": row["epoch"], "loss": row["loss"], "accuracy": row.get("test_balanced")}
        if row.get("covariance_change") is not None:
            point["covariance_change"] = row["covariance_change"]
        points.append(point | by_epoch.get(row["epoch"], {}))
    return points


def epsilon_record(log: EpsilonLog) -> dict[str, Any] | None:
    """What ε did, and how well it tells wrong labels from right ones where both are known."""
    record, epsilon = log.as_record(), log.mean_epsilon()
    if record is None or epsilon is None:
        return record
    known = detection(epsilon, log.wrong.cpu()) if log.noisy else None
    return {**record, "label_issues": known}


def covariance_diagnostics(
    trainer: Trainer, train: Dataset, epsilon: Tensor | None
) -> dict[str, Any]:
    """The spectrum of Σ and how tight the surrogate is, where the method has a Σ.

    epsilon: of each training sample, (N), what it was in training; None for a method without. A
    sample that was not visited has 0.
    """
    covariance = trainer.method.covariance
    if covariance is None or covariance.mean.numel() > MOST_EIGENVALUES:
        return {"spectrum": None, "surrogate": None}
    count = len(train)  # type: ignore[arg-type]
    rows = torch.arange(GAP_ROWS) * count // GAP_ROWS if count > GAP_ROWS else torch.arange(count)
    outputs = trainer.outputs(train, rows=rows)
    weight, bias = detached(trainer.method.head)
    device, bias = covariance.mean.device, None if bias is None else bias.cpu()
    parts = outputs.features.to(device), outputs.labels.to(device)
    features, sigma = trainer.method.seen_by_loss(*parts)
    features, sigma = features.float().cpu(), None if sigma is None else sigma.cpu()
    strengths = None if epsilon is None else epsilon[rows].nan_to_num(0.0).float()
    inputs = LossInputs(features, weight.cpu(), bias, outputs.labels, sigma, strengths)
    gap = surrogate_gap(inputs, alpha=float(trainer.method.alpha), samples=200)
    return {"spectrum": spectrum(covariance).tolist(), "surrogate": gap.as_record()}
