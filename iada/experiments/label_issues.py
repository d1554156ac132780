"""ε as a detector of wrong labels: what is moved the other way (ε < 0) is what is not believed."""

import torch
from torch import Tensor

from iada.utils.checks import check_float, check_sizes, refusal


def label_issues(epsilon: Tensor) -> Tensor:
    """Samples in the order in which to look at their labels: row numbers (N), smallest ε first.

    epsilon: the mean ε of each sample late in training, (N), as `EpsilonLog.mean_epsilon` has it;
    NaN for a sample that was not visited, which comes last.
    """
    check_float("epsilon", epsilon, "the ε of each sample, (N)", (None,))
    return epsilon.nan_to_num(torch.inf).argsort(stable=True)


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
        raise refusal("wrong", "bool (N)", f"dtype {wrong.dtype}", "pass given != true labels")
    known = ~epsilon.isnan()
    epsilon, wrong = epsilon[known].double().cpu(), wrong[known].cpu()
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        return None
    # Mann and Whitney: ranks, those of equal values averaged.
    _, value_of, counts = epsilon.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[value_of]
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
