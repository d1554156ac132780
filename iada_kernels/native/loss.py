"""The IADA loss and its gradients by the native operators.

The forward operator computes D = softmax(z̃) − onehot(y) and, for a reduced loss, every gradient
that needs a second look at the features or at Σ; the backward operator scales these and adds
∂L/∂h = D W and ∂L/∂Σ. With reduction="none" the rows' weights are known in the backward pass only,
which then runs the forward operator again with them.

With a stream the update of Σ is part of the same operator call: Σ is read while it is still in a
cache, and a label out of range is refused before anything is changed.

Where the head is large and Σ is not full, the work is in dense products of W: those are torch's,
and the closed forms, which are made of them, serve the call, so that it takes what they take.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels import closed_form
from iada_kernels.closed_form.loss import SavedLoss as ClosedFormSaved
from iada_kernels.contract import (
    ClassStatistics,
    LossGradients,
    LossInputs,
    LossNeeds,
    LossOptions,
)
from iada_kernels.native import library
from iada_kernels.native.covariance import covariance_update, mark_changed
from iada_kernels.native.fakes import BIAS, EPSILON, PRIOR, WEIGHT

if library.is_available():
    _forward = torch.ops.iada_native.loss_forward.default
    _forward_update = torch.ops.iada_native.loss_forward_update.default
    _backward = torch.ops.iada_native.loss_backward.default

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as in operators.cpp
SUM = REDUCTIONS["sum"]
LARGE_HEAD = 2**18  # numbers of W: 1 MiB of float32, more than a core's cache holds beside a block


class SavedLoss(NamedTuple):
    """residual is D (N, C); partial holds ∂L/∂W, ∂L/∂b and ∂L/∂ε, those asked for, in a row."""

    residual: Tensor
    partial: Tensor


def loss_forward(
    inputs: LossInputs,
    options: LossOptions,
    needs: LossNeeds,
    stream: ClassStatistics | None = None,
) -> tuple[Tensor, SavedLoss | ClosedFormSaved]:
    """The reduced loss and what `loss_backward` needs; the batch first goes into a `stream`."""
    covariance = inputs.covariance
    large = inputs.weight.numel() > LARGE_HEAD and (covariance is None or covariance.dim() == 2)
    if large:
        if stream is not None:
            _take_in(inputs, options, stream)
        return closed_form.loss_forward(inputs, options, needs)
    reduction = REDUCTIONS[options.reduction]
    wanted = _wanted(needs)
    if reduction == 0:  # gradients that sum over rows wait for the rows' weights
        wanted &= ~(WEIGHT | BIAS | PRIOR | EPSILON)
        wanted |= int(wanted == 0 and any((needs.weight, needs.bias, needs.log_prior)))
    if stream is None:
        return _saved(_call(inputs, options, None, reduction, wanted))
    assert covariance is not None
    dtype = inputs.compute_dtype
    state = (covariance, stream.mean, stream.count)
    if not (covariance.dtype == stream.mean.dtype == dtype and _all_contiguous(state)):
        _take_in(inputs, options, stream)
        return _saved(_call(inputs, options, None, reduction, wanted))
    found = _forward_update(
        inputs.features.contiguous(),
        plain(inputs.weight, dtype),
        plain(inputs.bias, dtype),
        inputs.labels.contiguous(),
        *state,
        plain(inputs.epsilon, dtype),
        plain(inputs.log_prior, dtype),
        options.alpha,
        options.beta,
        options.ignore_index,
        reduction,
        wanted,
    )
    mark_changed(state)
    return _saved(found)


def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedLoss | ClosedFormSaved,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype, others in the compute dtype."""
    if isinstance(saved, ClosedFormSaved):
        return closed_form.loss_backward(inputs, options, saved, grad_loss, needs)
    wanted = _wanted(needs)
    residual, partial = saved
    if options.reduction == "none":
        _, residual, partial = _call(inputs, options, grad_loss, SUM, wanted)
        grad_loss = grad_loss.new_ones(())
    weight = plain(inputs.weight, residual.dtype)
    features, dim = inputs.features.contiguous(), 0
    if inputs.covariance is not None:
        dim = inputs.covariance.dim()
    found = _backward(
        grad_loss,
        features,
        weight,
        inputs.labels,
        residual,
        partial,
        dim,
        options.alpha,
        options.beta,
        options.ignore_index,
        wanted,
    )
    return LossGradients(
        features=found[0] if needs.features else None,
        weight=found[1] if needs.weight else None,
        bias=found[2] if needs.bias else None,
        covariance=found[3] if needs.covariance else None,
        epsilon=found[4] if needs.epsilon else None,
        log_prior=found[5] if needs.log_prior else None,
    )


def _take_in(inputs: LossInputs, options: LossOptions, stream: ClassStatistics) -> None:
    assert inputs.covariance is not None
    labels = inputs.labels
    if 0 <= options.ignore_index < len(stream.mean):  # a label outside is left out anyway
        labels = torch.where(labels == options.ignore_index, -1, labels)
    covariance_update(inputs.covariance, stream.mean, stream.count, inputs.features, labels)


def _saved(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, SavedLoss]:
    loss, residual, partial = found
    return loss, SavedLoss(residual, partial)


def _all_contiguous(tensors: tuple[Tensor, ...]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _call(
    inputs: LossInputs,
    options: LossOptions,
    row_scale: Tensor | None,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = inputs.compute_dtype
    return _forward(
        inputs.features.contiguous(),
        plain(inputs.weight, dtype),
        plain(inputs.bias, dtype),
        inputs.labels.contiguous(),
        plain(inputs.covariance, dtype),
        plain(inputs.epsilon, dtype),
        plain(inputs.log_prior, dtype),
        plain(row_scale, dtype),
        options.alpha,
        options.beta,
        options.ignore_index,
        reduction,
        wanted,
    )


def plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous and in the compute dtype; itself where it is that already."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _wanted(needs: LossNeeds) -> int:
    return (
        needs.features
        | needs.weight << 1
        | needs.bias << 2
        | needs.covariance << 3
        | needs.epsilon << 4
        | needs.log_prior << 5
    )
