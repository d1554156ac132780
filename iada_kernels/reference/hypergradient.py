"""What a meta loss after one virtual step needs of the training loss.

With φ̄ = φ − η ∇_φ L and v = ∇_φ̄ L_meta, both dL_meta/dε and dL_meta/dΣ are −η times the gradients
of L̇, the derivative of L along v. Seen from the head, v is (ḣ, V, v_b): ḣ the Jacobian-vector
product of the features, V and v_b the parts of W and b.
"""

import torch
from einops import einsum
from torch import Tensor

from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.low_rank import unfolded
from iada_kernels.reference.loss import adjusted_logits, perturbation_sign


def directional_derivative(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, sign: Tensor | None = None
) -> Tensor:
    """L̇ = Σ_i Σ_j D_ij ż̃_ij, over the rows that count and divided by their number for the mean.

    ż̃_ij = w_j·ḣ_i + V_j·(h_i + δ_i) + v_bj + α (w_j − w_y)ᵀ Σ_y (V_j − V_y), and D = softmax(z̃)
    less the one-hot label.
    """
    weight, epsilon = inputs.weight, inputs.epsilon
    valid = inputs.labels != options.ignore_index
    target = torch.where(valid, inputs.labels, 0)
    if epsilon is not None and sign is None:
        logits = inputs.features @ weight.T
        logits = logits if inputs.bias is None else logits + inputs.bias
        sign = perturbation_sign(logits, weight, target)
    logits = adjusted_logits(inputs._replace(labels=target), options, sign)
    residual = logits.softmax(dim=1) - torch.nn.functional.one_hot(target, len(weight))
    perturbed = inputs.features
    if epsilon is not None and sign is not None:
        perturbed = perturbed + epsilon[:, None] * sign
    tangent = perturbed @ tangents.weight.T
    if tangents.features is not None:
        tangent = tangent + tangents.features @ weight.T
    if tangents.bias is not None:
        tangent = tangent + tangents.bias
    if inputs.covariance is not None:
        form = _quadratic_tangent(weight, tangents.weight, inputs.covariance, target)
        tangent = tangent + options.alpha * form
    total = torch.where(valid, (residual * tangent).sum(dim=1), 0.0).sum()
    return total / valid.sum().clamp(min=1) if options.reduction == "mean" else total


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, sign: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(∂L̇/∂ε (N), ∂L̇/∂Σ symmetric, or by d and U of a packed one), None for what is not there."""
    covariance, epsilon = (
        None if t is None else t.detach().requires_grad_()
        for t in (inputs.covariance, inputs.epsilon)
    )
    inputs = inputs._replace(covariance=covariance, epsilon=epsilon)
    derivative = directional_derivative(inputs, options, tangents, sign)
    present = [leaf for leaf in (epsilon, covariance) if leaf is not None]
    gradients = iter(torch.autograd.grad(derivative, present))
    return (
        None if epsilon is None else next(gradients),
        None if covariance is None else next(gradients),
    )


def _quadratic_tangent(
    weight: Tensor, weight_tangent: Tensor, covariance: Tensor, labels: Tensor
) -> Tensor:
    """The derivative of ρ_ij along V, (N, C), which sees the symmetric part of Σ only."""
    delta = weight[None, :, :] - weight[labels][:, None, :]
    delta_tangent = weight_tangent[None, :, :] - weight_tangent[labels][:, None, :]
    sigma = unfolded(covariance, weight.shape[1])[labels]
    if sigma.dim() == 2:
        return einsum(delta, sigma, delta_tangent, "n c a, n a, n c a -> n c")
    sigma = (sigma + sigma.mT) / 2
    return einsum(delta, sigma, delta_tangent, "n c a, n a b, n c b -> n c")
