"""What one epoch of training is described by, and the time that its phases took."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.method import MetaStep
from iada.nn.class_covariance import ClassCovariance
from iada.utils.distributed import Group, add_up

HISTOGRAM_BINS = 20  # of ε over (−1, 1)
COUNTS = ("epsilon_histogram", "adversarial", "visits")
PHASES = ("data", "step", "validation", "checkpoint")


class EpochMeasures(nn.Module):
    """Losses and strengths of one epoch, kept on the model's device: no step waits for the host.

    Args:
        steps: of the epoch.
        num_classes: C.

    Attributes:
        losses, meta_losses: of each step, (steps); NaN where there was none.
        epsilon_histogram: samples in equal bins of ε over (−1, 1), (20) int64.
        adversarial, visits: samples with ε > 0, and with any ε, of each class, (C) int64.
    """

    def __init__(self, steps: int, num_classes: int) -> None:
        super().__init__()
        self.losses = nn.Buffer(torch.full((steps,), torch.nan))
        self.meta_losses = nn.Buffer(torch.full((steps,), torch.nan))
        self.epsilon_histogram = nn.Buffer(torch.zeros(HISTOGRAM_BINS, dtype=torch.int64))
        self.adversarial = nn.Buffer(torch.zeros(num_classes, dtype=torch.int64))
        self.visits = nn.Buffer(torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def record(self, place: int, result: Tensor | MetaStep, labels: Tensor) -> None:
        """Take in step `place` of the epoch; labels (N), of the rows that result.epsilon has."""
        if not isinstance(result, MetaStep):
            self.losses[place] = result
            return
        self.losses[place] = result.loss
        self.meta_losses[place] = result.meta_loss
        if result.epsilon is None:
            return
        epsilon, labels = result.epsilon, labels.long()
        one = torch.ones_like(labels)
        self.epsilon_histogram.index_add_(0, epsilon_bins(epsilon), one)
        self.adversarial.index_add_(0, labels, (epsilon > 0).to(one.dtype))
        self.visits.index_add_(0, labels, one)

    @torch.no_grad()
    def summary(self, covariance: ClassCovariance | None, group: Group = None) -> dict[str, Any]:
        """The epoch so far in plain numbers, read from the device at once; over all ranks.

        loss and meta_loss are means over steps, adversarial_share and covariance_trace lists over
        classes. None stands for what was not measured, as for a class that was not visited.
        """
        counts = self._counts(group)
        share = counts["adversarial"] / counts["visits"]  # 0 / 0 is NaN
        trace = None if covariance is None else covariance.variances.sum(dim=1).tolist()
        strengths = bool(counts["visits"].any())
        return {
            "loss": number_or_none(self.losses.nanmean()),
            "meta_loss": number_or_none(self.meta_losses.nanmean()),
            "epsilon_histogram": counts["epsilon_histogram"].tolist() if strengths else None,
            "adversarial_share": [number_or_none(s) for s in share.cpu()] if strengths else None,
            "covariance_trace": trace,
        }

    def whole_state(self, group: Group = None) -> dict[str, Tensor]:
        """`state_dict` with the counts of all ranks."""
        return {**self.state_dict(), **self._counts(group)}

    def forget_counts(self) -> None:
        """For all ranks but one after loading a `whole_state`: the sums stay as they were."""
        for name in COUNTS:
            getattr(self, name).zero_()

    def _counts(self, group: Group) -> dict[str, Tensor]:
        """Summed over the ranks; the own ones stay."""
        counts = {name: getattr(self, name).clone() for name in COUNTS}
        add_up(counts.values(), group)
        return counts


class PhaseTimes:
    """Seconds spent in each of PHASES, by the host's clock.

    On an accelerator the host runs ahead: the wait for it falls into the phase that first reads
    a result, at the latest the end of the epoch, which counts as "step".
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The times so far as seconds_<phase>, which start again at 0."""
        taken = {f"seconds_{name}": value for name, value in self.seconds.items()}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return taken


def epsilon_bins(epsilon: Tensor) -> Tensor:
    """The histogram bin of each ε in (−1, 1), int64."""
    return ((epsilon + 1) * (HISTOGRAM_BINS / 2)).long().clamp(0, HISTOGRAM_BINS - 1)


def number_or_none(value: Tensor) -> float | None:
    """A Python float, None for NaN."""
    number = float(value)
    return None if number != number else number
