"""The hypergradient of the head and the step of Σ along it, by the native operators.

Large heads with a diagonal Σ are dense products: the closed forms serve them, as in `native.loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels import closed_form
from iada_kernels.closed_form.hypergradient import ClassSums
from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.native import library
from iada_kernels.native.covariance import mark_changed
from iada_kernels.native.loss import LARGE_HEAD, REDUCTIONS, plain

if library.is_available():
    _hypergradient = torch.ops.iada_native.hypergradient.default
    _covariance_step = torch.ops.iada_native.covariance_step.default


class RowSums(NamedTuple):
    """D and c (N, C) of `closed_form.hypergradient`, divided as the loss is, 0 where ignored."""

    labels: Tensor
    residual: Tensor
    curvature: Tensor
    alpha: float
    ignore_index: int


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, RowSums | ClassSums | None]:
    """∂L̇/∂ε (N) and what `covariance_step` needs to make ∂L̇/∂Σ."""
    covariance = inputs.covariance
    full = covariance is not None and covariance.dim() == 3
    if inputs.weight.numel() > LARGE_HEAD and not full:
        return closed_form.hypergradient(inputs, options, tangents, needs_covariance)
    dtype = inputs.compute_dtype
    labels = inputs.labels.contiguous()
    grad_epsilon, residual, curvature = _hypergradient(
        inputs.features.contiguous(),
        plain(inputs.weight, dtype),
        plain(inputs.bias, dtype),
        labels,
        plain(covariance, dtype),
        plain(inputs.epsilon, dtype),
        plain(inputs.log_prior, dtype),
        plain(tangents.features, dtype),
        plain(tangents.weight, dtype),
        plain(tangents.bias, dtype),
        options.alpha,
        options.beta,
        options.ignore_index,
        REDUCTIONS[options.reduction],
        needs_covariance,
    )
    sums = None
    if needs_covariance and covariance is not None:
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
        return closed_form.covariance_step(covariance, weight, weight_tangent, sums, scale)
    dtype = sums.residual.dtype
    state = covariance
    if covariance.dtype != dtype or not covariance.is_contiguous():
        state = covariance.to(dtype).contiguous()
    _covariance_step(
        state,
        plain(weight, dtype),
        plain(weight_tangent, dtype),
        sums.labels,
        sums.residual,
        sums.curvature,
        sums.ignore_index,
        scale * sums.alpha,
    )
    if state is covariance:
        mark_changed((covariance,))
    else:
        covariance.copy_(state)
    return None
