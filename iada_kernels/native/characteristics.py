"""The characteristics of a batch by the native operator."""

import torch
from torch import Tensor

from iada_kernels import torch_ops
from iada_kernels.layout import contiguous_as
from iada_kernels.native import library

if library.is_available():
    _characteristics = torch.ops.iada_native.characteristics.default

MOST_NEIGHBOURS = 64  # as in passes.hpp; torch's operators sort for more


def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """(N, 8) in the dtype of the logits, at least float32; see `reference.characteristics`."""
    if neighbours > MOST_NEIGHBOURS:
        return torch_ops.characteristics(features, logits, labels, weight, neighbours)
    dtype = torch.promote_types(torch.float32, logits.dtype)
    return _characteristics(
        features.contiguous(),
        logits.contiguous(),
        labels.contiguous(),
        contiguous_as(weight, dtype),
        neighbours,
    )
