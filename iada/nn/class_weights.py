"""Weights of classes by their effective numbers of samples."""

import torch
from torch import Tensor

from iada.nn.priors import checked_counts


def class_balanced_weights(class_counts: Tensor, beta: float) -> Tensor:
    """(1 − β) / (1 − βⁿ) of each class, (C) float64, scaled to add up to C.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019. β in [0, 1):
    0 weighs all classes alike, towards 1 the weights are inverse frequencies. A class without
    samples counts as one.
    """
    counts = checked_counts(class_counts)
    weights = (1 - beta) / -torch.expm1(counts * torch.tensor(beta, dtype=counts.dtype).log())
    return weights * (len(counts) / weights.sum())
