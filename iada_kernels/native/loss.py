"""The IADA loss and its gradients by the native operators.

The forward operator computes D = softmax(z̃) − onehot(y) and, for a reduced loss, every gradient
for which features or Σ would be read again; the backward operator scales these and adds
∂L/∂h = D W and ∂L/∂Σ. With reduction="none" the rows' weights are known in the backward pass only,
which then runs the forward operator again with them.

With a stream the update of Σ is part of the same operator call: Σ is read while it is still in a
cache, and a label out of range is refused before anything is changed.

After torch.set_float32_matmul_precision("medium") the class pass of these operators multiplies the
differences of W with a full float32 Σ as bfloat16, where the processor has AVX512-BF16; under
torch.compile, as it was set when the graph was traced: a change need not trace it again.

Where the head is large and Σ is not full, the work is in dense products of W, and `torch_ops`,
which is made of torch's matrix products, serves the call.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels import torch_ops
from iada_kernels.contract import ClassStatistics, LossGradients, LossInputs, LossNeeds, LossOptions
from iada_kernels.layout import contiguous_as
from iada_kernels.native import library
from iada_kernels.native.batch import covariance_update
from iada_kernels.native.fakes import BIAS, EPSILON, PRIOR, WEIGHT
from iada_kernels.precision import allows_bfloat16
from iada_kernels.streaming import is_writable, mark_updated, update_statistics
from iada_kernels.torch_ops.class_blocks import SavedRows
from iada_kernels.torch_ops.loss import SavedLoss as TorchSavedLoss

if library.is_available():
    _forward = torch.ops.iada_native.loss_forward.default
    _forward_update = torch.ops.iada_native.loss_forward_update.default
    _backward = torch.ops.iada_native.loss_backward.default

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as in operators.hpp
SUM = REDUCTIONS["sum"]
LARGE_HEAD = 2**18  # elements of W: 1 MiB of float32, more than a core caches beside a block


class SavedLoss(NamedTuple):
    """What the forward operator keeps for the backward operator."""

    residual: Tensor  # D (N, C)
    partial: Tensor  # ∂L/∂W, ∂L/∂b and ∂L/∂ε, those asked for, flat and concatenated


def loss_forward(
    inputs: LossInputs,
    options: LossOptions,
    needs: LossNeeds,
    stream: ClassStatistics | None = None,
) -> tuple[Tensor, SavedLoss | TorchSavedLoss | SavedRows]:
    """The reduced loss and what `loss_backward` needs; a `stream` is updated first."""
    covariance, dtype = inputs.covariance, inputs.compute_dtype
    dense, fused_update = is_dense(inputs), False
    if stream is not None and covariance is not None:
        state = (covariance, stream.mean, stream.count)
        fused_update = not dense and is_writable(state, dtype)
        if not fused_update:
            update_statistics(covariance_update, inputs, options, stream)
    if dense:
        return torch_ops.loss_forward(inputs, options, needs)
    reduction = REDUCTIONS[options.reduction]
    needed = _bits(needs)
    if reduction == 0:  # gradients that sum over rows wait for the rows' weights
        needed &= ~(WEIGHT | BIAS | PRIOR | EPSILON)
        needed |= int(needed == 0 and any((needs.weight, needs.bias, needs.log_prior)))
    if not fused_update:
        loss, residual, partial = _call(inputs, dtype, options, None, reduction, needed)
        return loss, SavedLoss(residual, partial)
    *head, _, epsilon, log_prior = operator_inputs(inputs, dtype)
    tensors = (*head, *state, epsilon, log_prior)
    numbers = (*options[:3], reduction, needed, allows_bfloat16())
    loss, residual, partial = _forward_update(*tensors, *numbers)
    mark_updated(state)
    return loss, SavedLoss(residual, partial)


def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedLoss | TorchSavedLoss | SavedRows,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype, others in the compute dtype."""
    if not isinstance(saved, SavedLoss):
        return torch_ops.loss_backward(inputs, options, saved, grad_loss, needs)
    needed = _bits(needs)
    residual, partial = saved
    if options.reduction == "none":
        _, residual, partial = _call(inputs, residual.dtype, options, grad_loss, SUM, needed)
        grad_loss = grad_loss.new_ones(())
    weight = contiguous_as(inputs.weight, residual.dtype)
    tensors = (inputs.features.contiguous(), weight, inputs.labels.contiguous(), residual, partial)
    covariance_dim = 0 if inputs.covariance is None else inputs.covariance.dim()
    gradients = _backward(grad_loss, *tensors, covariance_dim, *options[:3], needed)
    return LossGradients(*[g if need else None for g, need in zip(gradients, needs, strict=True)])


def is_dense(inputs: LossInputs) -> bool:
    """Whether the work is in dense products of a large W, which are torch's."""
    return inputs.weight.numel() > LARGE_HEAD and not inputs.has_full_covariance


def operator_inputs(inputs: LossInputs, dtype: torch.dtype) -> list[Tensor | None]:
    """`inputs` as the operators read them: contiguous, in the compute dtype `dtype`.

    Features keep their own; blocks of them are converted where they are read.
    """
    return [
        inputs.features.contiguous(),
        contiguous_as(inputs.weight, dtype),
        contiguous_as(inputs.bias, dtype),
        inputs.labels.contiguous(),
        contiguous_as(inputs.covariance, dtype),
        contiguous_as(inputs.epsilon, dtype),
        contiguous_as(inputs.log_prior, dtype),
    ]


def _call(
    inputs: LossInputs,
    dtype: torch.dtype,
    options: LossOptions,
    row_scale: Tensor | None,
    reduction: int,
    needed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (*operator_inputs(inputs, dtype), contiguous_as(row_scale, dtype))
    return _forward(*tensors, *options[:3], reduction, needed, allows_bfloat16())


def _bits(needs: LossNeeds) -> int:
    features, weight, bias, covariance, epsilon, log_prior = needs
    return features | weight << 1 | bias << 2 | covariance << 3 | epsilon << 4 | log_prior << 5
