"""What ε did in the last epochs of a run, counted on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iada.training.label_issues import SampleLog
from iada.training.measures import HISTOGRAM_BINS, epsilon_bins


class EpsilonLog(SampleLog):
    """Visits by class, by right and wrong label, and by ε; fed by `iada.Trainer`'s observe.

    Args:
        labels: the training labels (N).
        wrong: (N) bool, labels that noise made wrong; None where there is no noise.
        num_classes: C.
        epochs: of the run.
    """

    labels: Tensor
    wrong: Tensor
    visits: Tensor
    histogram: Tensor

    def __init__(self, labels: Tensor, wrong: Tensor | None, num_classes: int, epochs: int) -> None:
        super().__init__(len(labels), epochs)
        self.noisy = wrong is not None
        given = torch.zeros_like(labels, dtype=torch.bool) if wrong is None else wrong
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("wrong", given, persistent=False)
        # [class, label wrong, ε > 0] and [label wrong, bin of ε over (−1, 1)]
        self.register_buffer("visits", torch.zeros(num_classes, 2, 2, dtype=torch.int64))
        self.register_buffer("histogram", torch.zeros(2, HISTOGRAM_BINS, dtype=torch.int64))

    @torch.no_grad()
    def __call__(self, trainer: Any, batch: Sequence[Any], result: Any) -> None:
        """Take in one step."""
        super().__call__(trainer, batch, result)
        epsilon = self.late_epsilon(trainer, result)
        if epsilon is None:
            return
        index = batch[2]
        one = torch.ones_like(index)
        labels, wrong = self.labels[index], self.wrong[index].long()
        adversarial = (epsilon > 0).long()
        self.visits.view(-1).index_add_(0, 4 * labels + 2 * wrong + adversarial, one)
        self.histogram.view(-1).index_add_(0, HISTOGRAM_BINS * wrong + epsilon_bins(epsilon), one)

    def as_record(self) -> dict[str, Any] | None:
        """Shares of adversarial visits and histograms, for a run's record; None without any."""
        if not self.visits.any():
            return None
        by_class = self.visits.sum(dim=1)
        by_label = self.visits.sum(dim=0)
        clean, flipped = self.histogram.tolist()
        return {
            "class_share": [_share(row) for row in by_class],
            "share_clean": _share(by_label[0]),
            "share_flipped": _share(by_label[1]) if self.noisy else None,
            "histogram_clean": clean,
            "histogram_flipped": flipped if self.noisy else None,
        }


def _share(counts: Tensor) -> float | None:
    total = int(counts.sum())
    return int(counts[1]) / total if total else None
