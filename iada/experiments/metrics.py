"""What a classifier's test outputs amount to: accuracies, precision, calibration, over seeds too.

Everything but the calibration follows from two tables of counts, predictions by class and hits by
group, so that torch is all that evaluation needs, on a training machine too. A figure that is not
defined, such as the accuracy on few-shot classes where there are none, is None and never NaN.

Source of many, medium and few: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World",
CVPR 2019. Of the calibration error: Guo et al., "On Calibration of Modern Neural Networks", 2017.
"""

import statistics
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.training.measures import number_or_none
from iada.utils.checks import (
    argument_error,
    check_finite,
    check_float,
    check_label_values,
    check_labels,
    check_sizes,
    check_tensor,
)

OURS = "meta-iada"  # the method whose lead over others is told, where a recipe names no other
MANY, FEW = 100, 20  # training images of a class: more than MANY, fewer than FEW
CALIBRATION_BINS = 15

Runs = Sequence[Mapping[str, Any]]  # records of finished runs

METRICS = {
    "top1": "Top-1 accuracy",
    "balanced": "Balanced accuracy",
    "many": f"Many-shot (> {MANY})",
    "medium": f"Medium-shot ({FEW}–{MANY})",
    "few": f"Few-shot (< {FEW})",
    "precision": "Precision",
    "average": "Average accuracy",
    "weighted_average": "Average, weighted",
    "worst_group": "Worst group",
    "ece": "Calibration error",
    "nll": "NLL (nats)",
    "posthoc_top1": "Top-1, post-hoc LA",
    "posthoc_precision": "Precision, post-hoc LA",
}
LOWER_IS_BETTER = ("ece", "nll")


class Measured(NamedTuple):
    """The figures of one test: shares in [0, 1], None where one is not defined.

    metrics: by the names in METRICS; "average", "weighted_average" and "worst_group" are None
    without groups. confusion: (C, C) counts, rows are true classes. group_accuracy: of each group,
    by its name, None for one without samples; None without groups. reliability: of each of
    CALIBRATION_BINS bins of confidence, its "count" and mean "confidence" and "accuracy", None
    without any.
    """

    metrics: dict[str, float | None]
    confusion: list[list[int]]
    group_accuracy: dict[str, float | None] | None
    reliability: dict[str, list[Any]]


class Paired(NamedTuple):
    """Differences of two methods seed by seed.

    margin: mean ± margin is the interval of 95 % by Student's distribution; p: of his paired test,
    two-sided, of this one comparison. Both are None of a single seed and without SciPy, and p of
    differences that are all the same, unless they are 0.
    """

    mean: float
    margin: float | None
    p: float | None
    seeds: int


class Spread(NamedTuple):
    """Mean and standard deviation (n − 1; None of a single run) over runs."""

    mean: float
    std: float | None
    runs: int


def measure(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor | Sequence[int],
    *,
    groups: Tensor | None = None,
    group_names: Sequence[str] = (),
    group_counts: Tensor | Sequence[int] | None = None,
) -> Measured:
    """Every metric of one test.

    top1 is over samples; balanced, many, medium and few are means of class accuracies, over the
    classes that have test samples. precision is class-macro over the same classes, 0 for one that
    is never predicted (as in the GLT benchmark of Tang et al., ECCV 2022). average is over
    samples, weighted_average over groups by their training counts (Waterbirds' convention; not
    defined if a group of the training data has no test sample), worst_group the least accurate
    group among those with test samples.

    Args:
        logits: (N, C), any floating dtype, without log prior or perturbation.
        labels: true classes (N).
        class_counts: training images of each class, (C).
        groups: the group of each sample, (N).
        group_names: of all groups; their numbers by default.
        group_counts: training images of each group.

    Raises ValueError for shapes or values that do not fit, logits that are not finite, or no rows.
    """
    _check(logits, labels, class_counts)
    num_classes = logits.shape[1]
    counts = torch.as_tensor(class_counts).cpu()
    predictions = logits.argmax(dim=1).cpu()
    labels = labels.long().cpu()
    table = confusion_matrix(predictions, labels, num_classes)
    accuracy = _ratio(table.diagonal(), table.sum(dim=1))
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics["top1"] = float(_ratio(table.diagonal().sum(), table.sum()))
    metrics["balanced"] = _mean(accuracy)
    metrics["many"] = _mean(accuracy[counts > MANY])
    metrics["medium"] = _mean(accuracy[(counts >= FEW) & (counts <= MANY)])
    metrics["few"] = _mean(accuracy[counts < FEW])
    metrics["precision"] = class_macro_precision(table)
    metrics["ece"] = calibration_error(logits, labels.to(logits.device))
    metrics["nll"] = float(F.cross_entropy(logits.double(), labels.to(logits.device)))
    adjusted = posthoc_predictions(logits, counts)
    posthoc = confusion_matrix(adjusted, labels, num_classes)
    metrics["posthoc_top1"] = float(_ratio(posthoc.diagonal().sum(), posthoc.sum()))
    metrics["posthoc_precision"] = class_macro_precision(posthoc)
    by_group = None
    if groups is not None:
        size = len(group_names) or int(groups.max()) + 1
        check_sizes("groups", groups, "the group of each row", (len(labels),))
        low, high = groups.aminmax()
        if low < 0 or high >= size:
            expected, got = f"numbers in [0, {size})", f"numbers from {int(low)} to {int(high)}"
            raise argument_error("groups", expected, got, "name every group in group_names")
        hits = (predictions == labels).double()
        group = groups.long().cpu()
        total = torch.bincount(group, minlength=size)
        share = _ratio(torch.zeros(size).double().index_add_(0, group, hits), total)
        metrics["average"] = metrics["top1"]
        metrics["worst_group"] = float(share[~share.isnan()].min())
        if group_counts is not None:
            weights = torch.as_tensor(group_counts).cpu()
            check_sizes("group_counts", weights, "training images of each group", (size,))
            used = weights > 0
            weighted = (share * weights.double())[used].sum() / weights[used].sum()
            metrics["weighted_average"] = number_or_none(weighted)
        names = list(group_names) or [str(group) for group in range(size)]
        by_group = dict(zip(names, map(number_or_none, share), strict=True))
    reliability = reliability_bins(logits, labels.to(logits.device))
    return Measured(metrics, table.tolist(), by_group, reliability)


def posthoc_predictions(logits: Tensor, class_counts: Tensor, tau: float = 1.0) -> Tensor:
    """Predictions (N) of the logits less τ log π: Logit Adjustment after training (Menon et al.).

    A class without training images is taken to have one.
    """
    log_counts = class_counts.clamp(min=1).double().log().cpu()
    return (logits.double().cpu() - tau * log_counts).argmax(dim=1)


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts (C, C) int64: row of the true class, column of the predicted one."""
    cells = labels.long() * num_classes + predictions
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def class_macro_precision(confusion: Tensor) -> float | None:
    """The mean over classes with samples of the share of right ones among a class's predictions.

    A class that is never predicted counts 0. None without samples.
    """
    present = confusion.sum(dim=1) > 0
    precision = _ratio(confusion.diagonal(), confusion.sum(dim=0).clamp(min=1))
    return _mean(precision[present])


def calibration_error(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: Σ_b n_b/N |accuracy_b − confidence_b| over equal bins (l, u]."""
    _, confidence, hits = _calibration_sums(logits, labels, bins)
    return float((hits - confidence).abs().sum() / len(logits))


def reliability_bins(
    logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS
) -> dict[str, list[Any]]:
    """What a reliability diagram shows: see `Measured`."""
    count, confidence, hits = _calibration_sums(logits, labels, bins)
    return {
        "count": count.long().tolist(),
        "confidence": [number_or_none(value) for value in confidence / count],
        "accuracy": [number_or_none(value) for value in hits / count],
    }


def _calibration_sums(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Of each bin its samples, their confidence and how many are right: (3, bins) float64."""
    confidence, predictions = logits.double().softmax(dim=1).max(dim=1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    hits = (predictions == labels).double()
    rows = torch.stack([torch.ones_like(hits), confidence, hits])
    return rows.new_zeros(3, bins).index_add_(1, bin_of, rows)


def mean_std(records: Runs) -> dict[str, dict[str, Spread]]:
    """The metrics of runs that differ in their seed: {"last": {metric: Spread}, "best": {...}}.

    Over the runs where a metric is defined; one that is defined in none is left out.
    """
    spreads: dict[str, dict[str, Spread]] = {}
    for epoch in ("last", "best"):
        spreads[epoch] = {}
        for name in METRICS:
            values = [(record.get(epoch) or {}).get(name) for record in records]
            known = [float(value) for value in values if value is not None]
            if known:
                spreads[epoch][name] = spread(known)
    return spreads


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def paired(records: Runs, others: Runs, metric: str) -> Paired | None:
    """The metric of runs less that of others of the same seeds, at the last epoch; None without."""
    ours, theirs = (
        {run.get("seed", 0): (run.get("last") or {}).get(metric) for run in runs}
        for runs in (records, others)
    )
    return paired_by_seed(ours, theirs)


def paired_by_seed(
    ours: Mapping[int, float | None], theirs: Mapping[int, float | None]
) -> Paired | None:
    """What one is ahead of the other at the seeds where both have a value; None without any."""
    pairs = [(value, theirs.get(seed)) for seed, value in ours.items()]
    gaps = [one - other for one, other in pairs if one is not None and other is not None]
    if len(gaps) < 2:
        return Paired(gaps[0], None, None, 1) if gaps else None
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    return Paired(mean, *_student(mean, error, len(gaps)), len(gaps))


def _student(mean: float, error: float, count: int) -> tuple[float | None, float | None]:
    """Margin of 95 % and two-sided p of a mean of `count` values with this standard error."""
    try:
        stats: Any = import_module("scipy.stats")
    except ImportError:  # comes with the extra "paper"
        return None, None
    if error <= 1e-12 * max(1.0, abs(mean)):  # the rounding of differences that are all the same
        return 0.0, 1.0 if abs(mean) <= error else None
    margin = error * float(stats.t.ppf(0.975, count - 1))
    return margin, 2 * float(stats.t.sf(abs(mean) / error, count - 1))


def _check(logits: Tensor, labels: Tensor, class_counts: Tensor | Sequence[int]) -> None:
    check_float("logits", logits, "a floating-point tensor (N, C)", (None, None))
    if logits.numel() == 0:
        shape = f"shape {tuple(logits.shape)}"
        raise argument_error("logits", "at least one row and one class", shape, "pass a test set")
    check_labels(labels, len(logits))
    check_label_values(labels.long(), logits.shape[1], None)
    check_finite("logits", logits, "look for what overflowed in the model")
    counts = torch.as_tensor(class_counts)
    expected = "training images of each class, (C)"
    check_tensor("class_counts", counts, expected)
    check_sizes("class_counts", counts, expected, (logits.shape[1],))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, NaN where the whole is 0."""
    return part.double() / whole.double()


def _mean(values: Tensor) -> float | None:
    """Over what is known, None if nothing is."""
    return number_or_none(values[~values.isnan()].mean())
