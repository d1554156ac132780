"""Whether a classifier's classes are in balance: its accuracy as τ log π is taken from its logits.

Where a method is best at some τ > 0 it still favours large classes, at τ < 0 small ones. How high
curves reach tells what methods differ in beside that.
"""

from typing import Any

from torch import Tensor

from iada.experiments.metrics import confusion_matrix, posthoc_predictions

TAUS = tuple(place / 10 for place in range(-10, 16))


def balance_curve(logits: Tensor, labels: Tensor, class_counts: Tensor) -> dict[str, Any]:
    """For a run's record: {"tau", "top1", "balanced"}, a figure for each of TAUS.

    Args:
        logits: of test samples, (N, C).
        labels: theirs, (N).
        class_counts: of the training samples, (C); their share is π, of an empty class that of one.
    """
    found: dict[str, Any] = {"tau": list(TAUS), "top1": [], "balanced": []}
    for tau in TAUS:
        predictions = posthoc_predictions(logits, class_counts, tau)
        table = confusion_matrix(predictions, labels.cpu(), logits.shape[1])
        hits = table.diagonal().double()
        found["top1"].append(float(hits.sum() / table.sum()))
        found["balanced"].append(float((hits / table.sum(dim=1)).nanmean()))
    return found
