"""The class prior π of Eq. 6, and weights of classes by their effective numbers of samples."""

import torch
from torch import Tensor

from iada.utils.checks import argument_error, check_sizes, check_tensor


def log_class_prior(class_counts: Tensor, num_classes: int | None = None) -> Tensor:
    """log π, (C) float32, from the training samples of each class.

    Examples:
        >>> iada.log_class_prior(torch.tensor([75, 25])).exp()
        tensor([0.7500, 0.2500])

    Args:
        class_counts: training samples of each class, (C). A class without any counts as one, so
            that no logit becomes −inf.
        num_classes: C, to be checked; None for as many as there are counts.

    Raises:
        ValueError: counts that are negative, shares below 1, not finite or of another length.
    """
    counts = checked_counts(class_counts, num_classes)
    return (counts / counts.sum()).log().float()


def checked_counts(class_counts: Tensor, num_classes: int | None = None) -> Tensor:
    """Samples of each class, (C) float64, at least 1; ValueError as by `log_class_prior`."""
    expected = "samples of each class, (C)" if num_classes is None else f"({num_classes},) counts"
    check_tensor("class_counts", class_counts, expected)
    check_sizes("class_counts", class_counts, expected, (num_classes,))
    expected = "numbers of samples, 0 or from 1 on"
    remedy = "count the training labels: torch.bincount(labels, minlength=C)"
    if class_counts.dtype == torch.bool or class_counts.is_complex():
        raise argument_error("class_counts", expected, f"dtype {class_counts.dtype}", remedy)
    counts = class_counts.double()
    shares = (counts > 0) & (counts < 1)  # soft labels may give 2.5 samples, not 0.25
    if not (torch.isfinite(counts) & (counts >= 0) & ~shares).all():
        remedy += ", or multiply shares by N"
        raise argument_error("class_counts", expected, str(class_counts.tolist()), remedy)
    return counts.clamp(min=1)


def class_balanced_weights(class_counts: Tensor, beta: float) -> Tensor:
    """(1 − β) / (1 − βⁿ) of each class, (C) float64, scaled to add up to C.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019. β in [0, 1):
    0 weighs all classes alike, towards 1 the weights are inverse frequencies. A class without
    samples counts as one.
    """
    counts = checked_counts(class_counts)
    weights = (1 - beta) / -torch.expm1(counts * torch.tensor(beta, dtype=counts.dtype).log())
    return weights * (len(counts) / weights.sum())
