"""Which labels to look at first: what training says of each sample, and how well that ranks them.

Meta-IADA moves a sample that it does not believe the other way (ε < 0), and what is mislabelled is
learned late, so that its loss over training is large.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iada.meta.method import MetaStep
from iada.utils.checks import argument_error, check_float, check_sizes

LAST_EPOCHS = 0.2  # of the run, in which ε is counted: forty of 200, as in the paper's Fig. 3 and 4


class LabelIssues(NamedTuple):
    """Samples in the order in which to look at their labels.

    Attributes:
        indices: row numbers (N), the most likely mislabelled first; samples of which nothing is
            known come last.
        scores: of each sample in the data's own order, (N) float64, from 0 to 1, which is the most
            likely one; NaN where nothing is known.
    """

    indices: Tensor
    scores: Tensor


class SampleLog(nn.Module):
    """The mean ε of each sample late in training, and its mean loss over all of it.

    Examples:
        >>> config = iada.TrainerConfig(epochs=5, ce_epochs=2, lr=0.01)
        >>> log = iada.SampleLog(len(train_set), config.epochs)
        >>> trainer = iada.Trainer(backbone, head, train_set, meta_set, config, observe=log)
        >>> history = trainer.fit()
        >>> issues = iada.label_issues(epsilon=log.mean_epsilon(), loss=log.mean_loss())
        >>> len(issues.indices[:20])
        20

    For the `observe` argument of `iada.Trainer`; the data set gives no index of its own. Losses
    are known of Meta-IADA and MetaSAug, which remember them, ε of Meta-IADA. Kept on the device
    that it is moved to: no step waits.

    Args:
        num_samples: of the training set.
        epochs: of the run, the last fifth of which counts for ε.

    Raises:
        ValueError: at the first step of a run of other epochs, or on another number of samples.
    """

    total: Tensor
    seen: Tensor
    loss_total: Tensor
    loss_seen: Tensor

    def __init__(self, num_samples: int, epochs: int) -> None:
        super().__init__()
        self.epochs, self._checked = epochs, False
        self.first_epoch = epochs - max(1, round(LAST_EPOCHS * epochs))
        for name in ("total", "loss_total"):  # sums over visits
            self.register_buffer(name, torch.zeros(num_samples, dtype=torch.float64))
        for name in ("seen", "loss_seen"):
            self.register_buffer(name, torch.zeros(num_samples, dtype=torch.int64))

    @torch.no_grad()
    def __call__(self, trainer: Any, batch: Sequence[Any], result: Any) -> None:
        """Take in one step."""
        if not self._checked:
            self._check(trainer)
        index = batch[2]
        one = torch.ones_like(index)
        memory = getattr(trainer.method, "memory", None)
        if memory is not None and len(memory.samples):
            known = memory.seen[index]  # of this step, but for methods that note none
            losses = memory.samples[index, 0] * known
            self.loss_total.index_add_(0, index, losses.to(self.loss_total.dtype))
            self.loss_seen.index_add_(0, index, known.to(one.dtype))
        epsilon = self.late_epsilon(trainer, result)
        if epsilon is not None:
            self.total.index_add_(0, index, epsilon.to(self.total.dtype))
            self.seen.index_add_(0, index, one)

    def _check(self, trainer: Any) -> None:
        """Whether it was made for the run that it is fed by."""
        if hasattr(trainer, "config") and hasattr(trainer, "train_set"):  # an `iada.Trainer`
            made = {"epochs": self.epochs, "num_samples": len(self.total)}
            run = {"epochs": trainer.config.epochs, "num_samples": len(trainer.train_set)}
            for name, wanted in run.items():
                if made[name] != wanted:
                    remedy = "build it of this run: SampleLog(len(train_set), config.epochs)"
                    raise argument_error(name, f"the run's {wanted}", made[name], remedy)
        self._checked = True

    def late_epsilon(self, trainer: Any, result: Any) -> Tensor | None:
        """The ε of a step (N) that counts; None of an early one, or without."""
        late = trainer.epoch >= self.first_epoch
        return result.epsilon if late and isinstance(result, MetaStep) else None

    def mean_epsilon(self) -> Tensor | None:
        """The mean ε of each sample over its late visits, (N) float64 on the CPU; NaN without any.

        None where the method learns no ε.
        """
        return (self.total / self.seen).cpu() if self.seen.any() else None

    def mean_loss(self) -> Tensor | None:
        """The mean loss of each sample over its visits, (N), in nats; None where not known."""
        return (self.loss_total / self.loss_seen).cpu() if self.loss_seen.any() else None


def label_issues(epsilon: Tensor | None = None, *, loss: Tensor | None = None) -> LabelIssues:
    """Rank samples by how likely their labels are wrong: small ε, large loss, or both.

    With both, a sample's score is the mean of its two ranks, equal values having equal ranks.

    Examples:
        >>> iada.label_issues(epsilon=torch.tensor([0.5, -0.9, 0.1])).indices
        tensor([1, 2, 0])

    Args:
        epsilon: the mean ε of each sample late in training, (N): `SampleLog.mean_epsilon`. NaN
            for a sample that was not visited.
        loss: the mean loss of each sample over training, (N), in nats: `SampleLog.mean_loss`.

    Raises:
        ValueError: neither is given, or they have other shapes, know nothing of any sample, or are
            no strengths (all 0; a loss in the place of ε).
    """
    given = {"epsilon": epsilon, "loss": loss}
    known = {name: values for name, values in given.items() if values is not None}
    if not known:
        remedy = "pass one; SampleLog collects them while Meta-IADA trains"
        raise argument_error("epsilon", "the ε of each sample, or its loss", "neither", remedy)
    count = len(next(iter(known.values())))
    scores = []
    for name, values in known.items():
        check_float(name, values, f"a number for each sample, ({count})", (count,))
        suspicion = values.detach().double().cpu()
        _check_informative(name, suspicion[~suspicion.isnan()])
        scores.append(_relative_ranks(-suspicion if name == "epsilon" else suspicion))
    score = torch.stack(scores).mean(dim=0)
    order = (-score).nan_to_num(torch.inf).argsort(stable=True)
    return LabelIssues(order, score)


def _check_informative(name: str, known: Tensor) -> None:
    """Of the samples that something is known of."""
    expected, remedy = "a number for some samples", "leave it out, or log the run's last epochs"
    if not len(known):
        raise argument_error(name, expected, "NaN for all", remedy)
    if name == "loss":
        return
    low, high = float(known.min()), float(known.max())
    if low == high == 0:
        raise argument_error(name, "strengths of samples", "0 for all", remedy)
    if low >= 0 and high > 1:
        expected, got = "strengths, within ±1 or some below 0", f"{low:.3g} to {high:.3g}"
        raise argument_error(name, expected, got, "pass losses by their name: loss=…")


def _relative_ranks(values: Tensor) -> Tensor:
    """From 0 for the smallest to 1 for the largest, (N); NaN stays."""
    known = ~values.isnan()
    ranks = torch.full_like(values, torch.nan)
    _, value_of, counts = values[known].unique(return_inverse=True, return_counts=True)
    most = max(1, int(known.sum()) - 1)
    ranks[known] = (_mean_ranks(counts) / most)[value_of]
    return ranks


def _mean_ranks(counts: Tensor) -> Tensor:
    """Of groups of equal values in ascending order, so many each: the mean rank, from 0 on."""
    return counts.cumsum(0).double() - (counts + 1) / 2


def detection(epsilon: Tensor, wrong: Tensor) -> dict[str, float] | None:
    """How well −ε tells wrong labels from right ones, over the samples that were visited.

    auroc: the chance that a wrong label has the smaller ε of a wrong and a right one, a half where
    they are equal. average_precision: of the ranking. precision: of the first as many as are wrong,
    how many are; their own share is `base_rate`, what a ranking by chance has of both. None without
    any wrong label, or any right one.

    epsilon: (N), NaN where not known. wrong: (N) bool.
    """
    check_float("epsilon", epsilon, "the ε of each sample, (N)", (None,))
    check_sizes("wrong", wrong, "bool (N)", (len(epsilon),))
    if wrong.dtype != torch.bool:
        remedy = "pass given != true labels"
        raise argument_error("wrong", "bool (N)", f"dtype {wrong.dtype}", remedy)
    known = ~epsilon.isnan()
    epsilon, wrong = epsilon[known].double().cpu(), wrong[known].cpu()
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        return None
    # Mann and Whitney: ranks, those of equal values averaged.
    _, value_of, counts = epsilon.unique(return_inverse=True, return_counts=True)
    ranks = 1 + _mean_ranks(counts)[value_of]
    above = float(ranks[wrong].sum()) - positive * (positive + 1) / 2
    # A threshold takes in all of one value at once, so that the order of equal ones is nothing.
    hits = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, value_of, wrong.double())
    taken, wrong_so_far = counts.cumsum(0), hits.cumsum(0)
    first = torch.searchsorted(taken, positive)
    before = taken[first] - counts[first]
    part = float(positive - before) / float(counts[first])  # of the last group that is taken
    return {
        "auroc": 1 - above / (positive * negative),
        "average_precision": float((hits * wrong_so_far / taken).sum()) / positive,
        "precision": float(wrong_so_far[first] - hits[first] + part * hits[first]) / positive,
        "base_rate": positive / (positive + negative),
    }
