"""The streaming class covariance by the native operator."""

import torch
from torch import Tensor

from iada_kernels.native import library

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
    if covariance.dtype == mean.dtype and all(t.is_contiguous() for t in state):
        _update(covariance, mean, count, features.contiguous(), labels.contiguous())
        mark_changed(state)
        return
    copies = (covariance.to(mean.dtype).contiguous(), mean.contiguous(), count.contiguous())
    _update(*copies, features.contiguous(), labels.contiguous())
    for tensor, copy in zip(state, copies, strict=True):
        if tensor is not copy:
            tensor.copy_(copy)


def mark_changed(state: tuple[Tensor, ...]) -> None:
    """Let autograd notice that Σ changed under a loss that still needs it."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)
