"""The hypergradient of the head and the step of Σ along it, by the native operators.

Large heads without a full Σ are dense products: `torch_ops` serves them, as in `native.loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels import torch_ops
from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.layout import contiguous_as
from iada_kernels.native import library
from iada_kernels.native.loss import REDUCTIONS, is_dense, operator_inputs
from iada_kernels.streaming import writable, write_back
from iada_kernels.torch_ops.hypergradient import ClassSums

if library.is_available():
    _hypergradient = torch.ops.iada_native.hypergradient.default
    _covariance_step = torch.ops.iada_native.covariance_step.default


class RowSums(NamedTuple):
    """D and c (N, C) of `torch_ops.hypergradient`, divided as the loss is, 0 where ignored."""

    labels: Tensor
    residual: Tensor
    curvature: Tensor
    alpha: float
    ignore_index: int


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, RowSums | ClassSums | None]:
    """∂L̇/∂ε (N) and what `covariance_step` needs to make ∂L̇/∂Σ."""
    if is_dense(inputs):
        return torch_ops.hypergradient(inputs, options, tangents, needs_covariance)
    dtype = inputs.compute_dtype
    tensors = operator_inputs(inputs, dtype) + [contiguous_as(moved, dtype) for moved in tangents]
    numbers = (*options[:3], REDUCTIONS[options.reduction], needs_covariance)
    grad_epsilon, residual, curvature = _hypergradient(*tensors, *numbers)
    sums = None
    if needs_covariance and inputs.covariance is not None:
        labels = inputs.labels.contiguous()
        sums = RowSums(labels, residual, curvature, options.alpha, options.ignore_index)
    return None if inputs.epsilon is None else grad_epsilon, sums


def covariance_step(
    covariance: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    sums: RowSums | ClassSums,
    scale: float,
) -> None:
    """Σ += scale · ∂L̇/∂Σ in place, for covariance (C, A, A) or (C, A)."""
    if isinstance(sums, ClassSums):
        return torch_ops.covariance_step(covariance, weight, weight_tangent, sums, scale)
    dtype = sums.residual.dtype
    written = writable([covariance], dtype)
    labels, residual, curvature, alpha, ignore_index = sums
    weights = (contiguous_as(weight, dtype), contiguous_as(weight_tangent, dtype))
    _covariance_step(*written, *weights, labels, residual, curvature, ignore_index, scale * alpha)
    write_back([covariance], written)
    return None


def covariance_step_bound(
    weight: Tensor, weight_tangent: Tensor, sums: RowSums | ClassSums
) -> Tensor | None:
    """At least the Frobenius norm of each class's ∂L̇/∂Σ, (C)."""
    if isinstance(sums, ClassSums):
        return torch_ops.covariance_step_bound(weight, weight_tangent, sums)
    labels = sums.labels.masked_fill(sums.labels == sums.ignore_index, 0).long()
    by_row = ClassSums(labels, sums.residual, sums.curvature)
    bound = torch_ops.covariance_step_bound(weight, weight_tangent, by_row)
    return None if bound is None else bound * abs(sums.alpha)
