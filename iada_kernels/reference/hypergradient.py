"""What a meta loss after one virtual step needs of the training loss.

With φ̄ = φ − η ∇_φ L and v = ∇_φ̄ L_meta, both dL_meta/dε and dL_meta/dΣ are −η times the gradients
of L̇, the derivative of L along v. Seen from the head, v is (ḣ, V, v_b): ḣ the Jacobian-vector
product of the features, V and v_b the head's own parts.

Shapes: feature_tangent ḣ (N, A), weight_tangent V (C, A), bias_tangent v_b (C); others as for
`iada_loss`.
"""

import torch
from einops import einsum
from torch import Tensor

from iada_kernels.reference.loss import adjusted_logits, perturbation_sign


def directional_derivative(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    feature_tangent: Tensor | None,
    weight_tangent: Tensor,
    bias_tangent: Tensor | None,
    alpha: float = 0.5,
    beta: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sign: Tensor | None = None,
) -> Tensor:
    """L̇ = Σ_i Σ_j D_ij ż̃_ij, over the rows that count and divided by their number for the mean.

    ż̃_ij = w_j·ḣ_i + V_j·(h_i + δ_i) + v_bj + α (w_j − w_y)ᵀ Σ_y (V_j − V_y), and D = softmax(z̃)
    less the one-hot label.
    """
    valid = labels != ignore_index
    target = torch.where(valid, labels, 0)
    if epsilon is not None and sign is None:
        logits = features @ weight.T
        sign = perturbation_sign(logits if bias is None else logits + bias, weight, target)
    logits = adjusted_logits(
        features, weight, bias, target, covariance, epsilon, log_prior, alpha, beta, sign
    )
    residual = logits.softmax(dim=1) - torch.nn.functional.one_hot(target, len(weight))
    moved = features if epsilon is None or sign is None else features + epsilon[:, None] * sign
    tangent = moved @ weight_tangent.T
    if feature_tangent is not None:
        tangent = tangent + feature_tangent @ weight.T
    if bias_tangent is not None:
        tangent = tangent + bias_tangent
    if covariance is not None:
        tangent = tangent + alpha * _quadratic_tangent(weight, weight_tangent, covariance, target)
    total = torch.where(valid, (residual * tangent).sum(dim=1), 0.0).sum()
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total


def hypergradient(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    feature_tangent: Tensor | None,
    weight_tangent: Tensor,
    bias_tangent: Tensor | None,
    **options: float | str | Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(∂L̇/∂ε (N), ∂L̇/∂Σ symmetric), None for what is not there. `options` as above."""
    covariance, epsilon = (
        None if t is None else t.detach().requires_grad_() for t in (covariance, epsilon)
    )
    derivative = directional_derivative(
        features,
        weight,
        bias,
        labels,
        covariance,
        epsilon,
        log_prior,
        feature_tangent,
        weight_tangent,
        bias_tangent,
        **options,  # type: ignore[arg-type]
    )
    wanted = [leaf for leaf in (epsilon, covariance) if leaf is not None]
    found = iter(torch.autograd.grad(derivative, wanted))
    return (
        None if epsilon is None else next(found),
        None if covariance is None else next(found),
    )


def _quadratic_tangent(
    weight: Tensor, weight_tangent: Tensor, covariance: Tensor, labels: Tensor
) -> Tensor:
    """The derivative of ρ_ij along V, (N, C), which sees the symmetric part of Σ only."""
    delta = weight[None, :, :] - weight[labels][:, None, :]
    moved = weight_tangent[None, :, :] - weight_tangent[labels][:, None, :]
    sigma = covariance[labels]
    if covariance.dim() == 2:
        return einsum(delta, sigma, moved, "n c a, n a, n c a -> n c")
    sigma = (sigma + sigma.mT) / 2
    return einsum(delta, sigma, moved, "n c a, n a b, n c b -> n c")
