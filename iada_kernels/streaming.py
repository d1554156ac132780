"""What the backends share around the streaming statistics: ignored rows, state that can be written.

The state is covariance (C, A, A) or (C, A), mean (C, A) and count (C) int64. Kernels write
contiguous tensors of one dtype; state of any other layout is copied, updated and copied back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iada_kernels.contract import ClassStatistics, LossInputs, LossOptions

CovarianceUpdate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def without_ignored(labels: Tensor, ignore_index: int, num_classes: int) -> Tensor:
    """Labels with −1, which is no class, where they are `ignore_index`."""
    if 0 <= ignore_index < num_classes:  # a label outside is left out anyway
        return torch.where(labels == ignore_index, -1, labels)
    return labels


def update_statistics(
    covariance_update: CovarianceUpdate,
    inputs: LossInputs,
    options: LossOptions,
    stream: ClassStatistics,
) -> None:
    """Update Σ, μ and n in place with the rows that are not ignored."""
    assert inputs.covariance is not None
    labels = without_ignored(inputs.labels, options.ignore_index, len(stream.mean))
    covariance_update(inputs.covariance, stream.mean, stream.count, inputs.features, labels)


def is_writable(state: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether kernels can write the state where it lies: contiguous, floating parts of `dtype`."""
    for tensor in state:
        if not tensor.is_contiguous():
            return False
        if tensor.dtype != dtype and tensor.is_floating_point():
            return False
    return True


def writable(state: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The state as kernels can write it: each tensor itself where possible, else a copy."""
    return [
        (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for tensor in state
    ]


def write_back(state: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Copy what was written to `writable(state)` into the state, and tell autograd."""
    for tensor, copy in zip(state, written, strict=True):
        if tensor is not copy:
            tensor.copy_(copy)
    mark_updated(state)


def mark_updated(state: Sequence[Tensor]) -> None:
    """Tell autograd: a loss that still needs the old Σ then refuses its backward pass."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tuple(state))
