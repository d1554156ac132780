"""Eq. 6 over a batch, with or without weights of the classes."""

import torch
from torch import Tensor

from iada.nn.functional import fused_loss


def weighted_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sigma: Tensor,
    epsilon: Tensor | None,
    *,
    log_prior: Tensor,
    alpha: float,
    beta: float,
    class_weights: Tensor | None,
) -> Tensor:
    """Σ ω_y ℓ / Σ ω_y over the rows, (); the mean for class_weights None."""
    losses = fused_loss(
        features,
        weight,
        bias,
        labels,
        covariance=sigma,
        epsilon=epsilon,
        log_prior=log_prior,
        alpha=alpha,
        beta=beta,
        reduction="mean" if class_weights is None else "none",
    )
    if class_weights is None:
        return losses
    own = class_weights[labels]
    return torch.linalg.vecdot(losses, own.to(losses.dtype)) / own.sum()
