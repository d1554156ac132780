"""Eq. 9, and what Eq. 8 starts from, by the closed forms of the head."""

from typing import Any

import torch
from torch import Tensor

from iada.nn.projection import SemidefiniteSteps
from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.dispatch import backend_for
from iada_kernels.low_rank import difference_norm, is_low_rank, unpacked
from iada_kernels.triangular import is_triangular, times_off_diagonal


def closed_form_step(
    inputs: LossInputs,
    *,
    alpha: float,
    beta: float,
    tangents: HeadTangents,
    class_weights: Tensor | None,
    covariance_lr: float,
    in_place: bool,
    skip_overflow: bool,
    guard: SemidefiniteSteps | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The meta loss's gradient by ε, (N), None without ε; and Σ after Eq. 9.

    Args:
        inputs: the training batch, detached.
        tangents: −η₁ v and its feature tangents, of `MetaPasses`.
        class_weights: as in `MetaIADA`.
        covariance_lr: η₂; 0 leaves Σ as it is.
        in_place: whether Σ itself moves, in one pass, or a copy does.
        guard: with `in_place`, keeps a full Σ positive semidefinite. Where it cannot without
            waiting for the device, a copy moves.
        skip_overflow: a gradient that is not finite leaves Σ as it is, as optimizers do.
    """
    former, weights = inputs.covariance, class_weights
    assert former is not None
    options = LossOptions(alpha, beta, -100, "mean" if weights is None else "sum")
    backend = backend_for(inputs, None, None)
    moves = covariance_lr != 0
    grad_epsilon, sums = backend.hypergradient(inputs, options, tangents, moves)
    # Weights of classes scale what each class's samples give: its Σ's gradient, and their ε's.
    own = None if weights is None else weights[inputs.labels]
    if grad_epsilon is not None and own is not None:
        grad_epsilon = grad_epsilon * (own / own.sum())
    if sums is None:
        return grad_epsilon, former
    scale = None if weights is None or own is None else weights / own.sum()
    sigma, bound = former, None
    if in_place and guard is not None:
        bound = backend.covariance_step_bound(inputs.weight, tangents.weight, sums)
    if not in_place or (guard is not None and bound is None):
        sigma = former.clone()

    def move(covariance: Tensor) -> None:
        step = covariance if scale is None else torch.zeros_like(covariance)
        backend.covariance_step(step, inputs.weight, tangents.weight, sums, -covariance_lr)
        if scale is not None:
            step *= scale.view(-1, *[1] * (step.dim() - 1))
            covariance += step

    if guard is not None and bound is not None:
        bound = bound * abs(covariance_lr) * (1.0 if scale is None else scale.abs())
        guard.step(sigma, bound.to(sigma.dtype), move)
    else:
        move(sigma)
    if skip_overflow:
        parts = [part for part in (*tangents, grad_epsilon) if part is not None]
        fine = torch.stack([torch.isfinite(part).all() for part in parts]).all()
        sigma = torch.where(fine, sigma, former)
    return grad_epsilon, sigma


def inverse_rate(optimizer: torch.optim.Optimizer, weight: Tensor) -> float:
    """1/η₁ of the parameter `weight`, or of the first group if it is in none; 0 for a rate of 0."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    own = [group for group in groups if any(weight is p for p in group["params"])]
    rate = float((own or groups)[0]["lr"])
    return 1 / rate if rate > 0 else 0.0


def relative_change(sigma: Tensor, former: Tensor, width: int) -> Tensor:
    """‖Σ − Σ'‖ / ‖Σ'‖ over all classes, (); 0 for two zeros. width: A."""
    tiny = torch.finfo(former.dtype).tiny
    if is_low_rank(sigma, width):
        change, size = difference_norm(unpacked(sigma, width), unpacked(former, width))
        return change / size.clamp(min=tiny)
    norm = torch.linalg.vector_norm
    if is_triangular(sigma, width):  # what stands for two entries counts twice
        sigma, former = (times_off_diagonal(each, width, 2**0.5) for each in (sigma, former))
    return norm(sigma - former) / norm(former).clamp(min=tiny)
