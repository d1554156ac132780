"""What ε did in the last epochs of a run, counted on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.method import MetaStep
from iada.training.measures import HISTOGRAM_BINS, epsilon_bins

LAST_EPOCHS = 0.2  # of the run, counted: forty of 200, as in Fig. 3 and 4


class EpsilonLog(nn.Module):
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
    total: Tensor
    seen: Tensor

    def __init__(self, labels: Tensor, wrong: Tensor | None, num_classes: int, epochs: int) -> None:
        super().__init__()
        self.noisy = wrong is not None
        self.first_epoch = epochs - max(1, round(LAST_EPOCHS * epochs))
        given = torch.zeros_like(labels, dtype=torch.bool) if wrong is None else wrong
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("wrong", given, persistent=False)
        # [class, label wrong, ε > 0] and [label wrong, bin of ε over (−1, 1)]
        self.register_buffer("visits", torch.zeros(num_classes, 2, 2, dtype=torch.int64))
        self.register_buffer("histogram", torch.zeros(2, HISTOGRAM_BINS, dtype=torch.int64))
        # The sum of ε of each sample, and its visits.
        self.register_buffer("total", torch.zeros(len(labels), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(len(labels), dtype=torch.int64))

    @torch.no_grad()
    def __call__(self, trainer: Any, batch: Sequence[Any], result: Any) -> None:
        """Take in one step."""
        learned = isinstance(result, MetaStep) and result.epsilon is not None
        if not learned or trainer.epoch < self.first_epoch:
            return
        index, epsilon = batch[2], result.epsilon
        one = torch.ones_like(index)
        labels, wrong = self.labels[index], self.wrong[index].long()
        adversarial = (epsilon > 0).long()
        self.visits.view(-1).index_add_(0, 4 * labels + 2 * wrong + adversarial, one)
        self.histogram.view(-1).index_add_(0, HISTOGRAM_BINS * wrong + epsilon_bins(epsilon), one)
        self.total.index_add_(0, index, epsilon.to(self.total.dtype))
        self.seen.index_add_(0, index, one)

    def mean_epsilon(self) -> Tensor | None:
        """The mean ε of each sample over its visits, (N) float64 on the CPU; NaN without any.

        None where the method learns no ε.
        """
        if not self.seen.any():
            return None
        return (self.total / self.seen).cpu()

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
