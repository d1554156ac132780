"""Batches by the native operators: whether one fits, its characteristics, class covariances."""

import torch
from torch import Tensor

from iada_kernels import torch_ops
from iada_kernels.contract import LossInputs
from iada_kernels.layout import contiguous_as
from iada_kernels.native import library
from iada_kernels.streaming import writable, write_back

if library.is_available():
    _arguments_fit = torch.ops.iada_native.arguments_fit.default
    _characteristics = torch.ops.iada_native.characteristics.default
    _update = torch.ops.iada_native.covariance_update.default

MOST_NEIGHBOURS = 64  # as in passes.hpp; torch's operators sort for more


def arguments_fit(inputs: LossInputs, ignore_index: int, streams: bool) -> bool:
    """Whether these are CPU tensors as `LossInputs` wants them, with values that fit.

    Labels in [0, C) or `ignore_index`, epsilon finite, and with `streams` the features too. False
    where it cannot tell as well: for arguments of any other kind, dtype, layout or device.
    """
    if not library.is_available():
        return False
    try:
        return _arguments_fit(*inputs, ignore_index, streams)
    except (RuntimeError, TypeError):  # not tensors, or not on a CPU
        return False


def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """(N, 8) in the dtype of the logits, at least float32; see `reference.characteristics`."""
    if neighbours > MOST_NEIGHBOURS:
        return torch_ops.characteristics(features, logits, labels, weight, neighbours)
    dtype = torch.promote_types(torch.float32, logits.dtype)
    rows = (features.contiguous(), logits.contiguous(), labels.contiguous())
    return _characteristics(*rows, contiguous_as(weight, dtype), neighbours)


def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    """One batch, in place on covariance (C, A, A) or (C, A), mean (C, A) and count (C) int64.

    features (N, A), any floating dtype, and labels (N) int64 are read only. A row with a label
    outside [0, C) is left out; a class absent from the batch keeps its bits.
    """
    state = (covariance, mean, count)
    written = writable(state, torch.promote_types(torch.float32, mean.dtype))
    _update(*written, features.contiguous(), labels.contiguous())
    write_back(state, written)
