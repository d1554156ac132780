"""The streaming class covariance by the native operator."""

import torch
from torch import Tensor

from iada_kernels.native import library
from iada_kernels.streaming import writable, write_back

if library.is_available():
    _update = torch.ops.iada_native.covariance_update.default


def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    """One batch, in place on covariance (C, A, A) or (C, A), mean (C, A) and count (C) int64.

    features (N, A), any floating dtype, and labels (N) int64 are read only. A row with a label
    outside [0, C) is left out; a class absent from the batch keeps its bits.
    """
    state = (covariance, mean, count)
    written = writable(state, mean.dtype)
    _update(*written, features.contiguous(), labels.contiguous())
    write_back(state, written)
