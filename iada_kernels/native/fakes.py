"""Shapes and dtypes of what the native operators return, for tracing (torch.compile)."""

import torch
from torch import Tensor

FEATURES, WEIGHT, BIAS, COVARIANCE, EPSILON, PRIOR = (1 << place for place in range(6))


def _loss_forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    row_scale: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = features.shape[0], weight.shape[0]
    partial = weight.numel() if needs & WEIGHT else 0
    partial += classes if needs & (BIAS | PRIOR) else 0
    partial += rows if needs & EPSILON and epsilon is not None else 0
    loss = weight.new_empty((rows,) if reduction == 0 else ())
    residual = weight.new_empty((rows, classes) if needs else (0,))
    return loss, residual, weight.new_empty(partial)


def _loss_forward_update(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor,
    mean: Tensor,
    count: Tensor,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (features, weight, bias, labels, covariance, epsilon, log_prior, None)
    return _loss_forward(*tensors, alpha, beta, ignore_index, reduction, needs)


def _loss_backward(
    grad_loss: Tensor,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    residual: Tensor,
    partial: Tensor,
    covariance_dim: int,
    alpha: float,
    beta: float,
    ignore_index: int,
    needs: int,
) -> tuple[Tensor, ...]:
    classes, width = weight.shape
    sigma = (classes, width, width) if covariance_dim == 3 else (classes, width)

    def maybe(need: int, shape: tuple[int, ...]) -> Tensor:
        return weight.new_empty(shape if needs & need else (0,))

    return (
        torch.empty_like(features) if needs & FEATURES else weight.new_empty(0),
        maybe(WEIGHT, (classes, width)),
        maybe(BIAS, (classes,)),
        maybe(COVARIANCE, sigma),
        maybe(EPSILON, (features.shape[0],)),
        maybe(PRIOR, (classes,)),
    )


def _covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    return None


def _hypergradient(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    features_tangent: Tensor | None,
    weight_tangent: Tensor,
    bias_tangent: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: int,
    needs_covariance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = features.shape[0], weight.shape[0]
    sums = (rows, classes) if needs_covariance and covariance is not None else (0,)
    grad_epsilon = weight.new_empty(0 if epsilon is None else rows)
    return grad_epsilon, weight.new_empty(sums), weight.new_empty(sums)


def _covariance_step(
    covariance: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    labels: Tensor,
    residual: Tensor,
    curvature: Tensor,
    ignore_index: int,
    scale: float,
) -> None:
    return None


def _characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    return weight.new_empty(features.shape[0], 8)


FAKES = (
    _loss_forward,
    _loss_forward_update,
    _loss_backward,
    _covariance_update,
    _hypergradient,
    _covariance_step,
    _characteristics,
)


def register() -> None:
    """Tell torch; to be called once, after the library is loaded."""
    for fake in FAKES:
        torch.library.register_fake(f"iada_native::{fake.__name__[1:]}", fake)
