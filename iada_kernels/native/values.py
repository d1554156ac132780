"""A quick look at the values of a batch, for the checks that are made of every call on a CPU."""

import torch
from torch import Tensor

from iada_kernels.native import library

if library.is_available():
    _values_fit = torch.ops.iada_native.values_fit.default


def values_fit(
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    epsilon: Tensor | None,
    features: Tensor | None,
) -> bool:
    """Whether labels (N) int64 are in [0, C) or ignore_index, epsilon (N) and features finite."""
    if epsilon is not None:
        epsilon = epsilon.contiguous()
    if features is not None:
        features = features.contiguous()
    return _values_fit(labels.contiguous(), num_classes, ignore_index, epsilon, features)
