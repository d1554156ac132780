"""The IADA loss, Eq. 6, with N·C·A temporaries and no rearrangement; shapes as in `LossInputs`."""

import torch
from einops import einsum
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.low_rank import unfolded


def perturbation_sign(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The direction of the perturbation, sign(∇_h CE(Wh + b, y)), as a constant (N, A).

    Written without the cancellation of softmax(z) − onehot(y): dividing the gradient by 1 − p_y
    leaves its sign alone, so with r the softmax over the classes other than y
    the sign is that of Σ_{j≠y} r_j w_j − w_y. A single class has no direction: zeros.
    """
    if weight.shape[0] == 1:
        return weight.new_zeros(logits.shape[0], weight.shape[1])
    with torch.no_grad():
        others = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
        return torch.sign(others @ weight - weight[labels])


def quadratic_forms(weight: Tensor, covariance: Tensor, labels: Tensor) -> Tensor:
    """ρ_ij = ½ (w_j − w_y)ᵀ Σ_y (w_j − w_y) with y the label of sample i: (N, C)."""
    delta = weight[None, :, :] - weight[labels][:, None, :]
    sigma = unfolded(covariance, weight.shape[1])[labels]
    if sigma.dim() == 2:
        return 0.5 * einsum(delta, sigma, delta, "n c a, n a, n c a -> n c")
    return 0.5 * einsum(delta, sigma, delta, "n c a, n a b, n c b -> n c")


def adjusted_logits(inputs: LossInputs, options: LossOptions, sign: Tensor | None = None) -> Tensor:
    """z̃ of Eq. 6, (N, C): w_j·(h + δ) + b_j + α ρ_j + β log π_j with δ = ε s; no row is ignored.

    `sign` replaces s, so that two precisions can be compared with the same direction.
    """
    weight, labels, epsilon = inputs.weight, inputs.labels, inputs.epsilon
    logits = inputs.features @ weight.T
    if inputs.bias is not None:
        logits = logits + inputs.bias
    adjusted = logits
    if epsilon is not None:
        if sign is None:
            sign = perturbation_sign(logits, weight, labels)
        adjusted = adjusted + (epsilon[:, None] * sign) @ weight.T
    if inputs.covariance is not None:
        adjusted = adjusted + options.alpha * quadratic_forms(weight, inputs.covariance, labels)
    if inputs.log_prior is not None:
        adjusted = adjusted + options.beta * inputs.log_prior
    return adjusted


def iada_loss(inputs: LossInputs, options: LossOptions, sign: Tensor | None = None) -> Tensor:
    """CE(z̃, y) of Eq. 6. The mean is over the rows that are not ignored; over none it is 0."""
    valid = inputs.labels != options.ignore_index
    target = torch.where(valid, inputs.labels, 0)
    adjusted = adjusted_logits(inputs._replace(labels=target), options, sign)
    log_probability = adjusted.log_softmax(dim=1)
    share = options.label_smoothing
    losses = -(1 - share) * log_probability.gather(1, target[:, None])[:, 0]
    if share:  # else a class whose log prior is −∞ would add 0 · ∞
        losses = losses - share * log_probability.mean(dim=1)
    losses = torch.where(valid, losses, 0.0)
    if options.reduction == "none":
        return losses
    if options.reduction == "sum":
        return losses.sum()
    return losses.sum() / valid.sum().clamp(min=1)
