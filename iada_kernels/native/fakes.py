"""Shapes and dtypes of what the native operators return, for tracing (torch.compile)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iada_kernels.contract import LossInputs

FEATURES, WEIGHT, BIAS, COVARIANCE, EPSILON, PRIOR = (1 << bit for bit in range(6))


def _loss_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`arguments`: the tensors of `LossInputs`, row_scale, and the numbers of the schema."""
    inputs, (*_, reduction, needs, _rounded) = LossInputs(*arguments[:7]), arguments[7:]
    weight = inputs.weight
    rows, classes = inputs.features.shape[0], weight.shape[0]
    partial = weight.numel() if needs & WEIGHT else 0
    partial += classes if needs & (BIAS | PRIOR) else 0
    partial += rows if needs & EPSILON and inputs.epsilon is not None else 0
    loss = weight.new_empty((rows,) if reduction == 0 else ())
    residual = weight.new_empty((rows, classes) if needs else (0,))
    return loss, residual, weight.new_empty(partial)


def _loss_forward_update(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `_loss_forward` with mean and count after the covariance, and without row_scale."""
    head, _, (epsilon, log_prior, *numbers) = arguments[:5], arguments[5:7], arguments[7:]
    return _loss_forward(*head, epsilon, log_prior, None, *numbers)


def _loss_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`arguments`: as `native.loss` calls the operator."""
    _, features, weight, _, _, _, covariance_dim, *_, needs = arguments
    classes, width = weight.shape
    sigma = (classes, width, width) if covariance_dim == 3 else (classes, width)
    shapes = {WEIGHT: (classes, width), BIAS: (classes,), COVARIANCE: sigma}
    shapes |= {EPSILON: (features.shape[0],), PRIOR: (classes,)}
    others = [weight.new_empty(shapes[need] if needs & need else (0,)) for need in shapes]
    return torch.empty_like(features) if needs & FEATURES else weight.new_empty(0), *others


def _hypergradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`arguments`: the tensors of `LossInputs` and of `HeadTangents`, the numbers of the schema."""
    inputs, needs_covariance = LossInputs(*arguments[:7]), arguments[-1]
    weight, rows = inputs.weight, inputs.features.shape[0]
    has_sums = needs_covariance and inputs.covariance is not None
    sums = (rows, weight.shape[0]) if has_sums else (0,)
    grad_epsilon = weight.new_empty(0 if inputs.epsilon is None else rows)
    return grad_epsilon, weight.new_empty(sums), weight.new_empty(sums)


def _in_place(*arguments: Any) -> None:
    """Of operators that return nothing."""


def _characteristics(features: Tensor, *others: Any) -> Tensor:
    return others[2].new_empty(features.shape[0], 8)  # in the dtype of the weight


FAKES: dict[str, Callable[..., Any]] = {
    "loss_forward": _loss_forward,
    "loss_forward_update": _loss_forward_update,
    "loss_backward": _loss_backward,
    "covariance_update": _in_place,
    "hypergradient": _hypergradient,
    "covariance_step": _in_place,
    "characteristics": _characteristics,
}
