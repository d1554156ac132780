"""The eager implementation that people have today, kept as the yardstick for swaps and benches."""

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.nn.class_covariance import ClassCovariance
from iada.utils.autocast import full_precision
from iada.utils.checks import check_loss_arguments


def eager_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    covariance: Tensor | ClassCovariance | None,
    epsilon: Tensor | None = None,
    log_prior: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The IADA loss (Eq. 6) in the style of the published ISDA and MetaSAug code.

    Builds the N×C×A differences, gathers a covariance for every sample (N×A×A), and takes the
    diagonal of an N×C×C product; autograd does the rest. Arguments, result and errors are those
    of `iada.fused_loss`, which computes the same thing without these temporaries.
    """
    if isinstance(covariance, ClassCovariance):
        covariance = covariance.covariance
    check_loss_arguments(
        features,
        weight,
        bias,
        labels,
        covariance,
        epsilon,
        log_prior,
        alpha,
        beta,
        ignore_index,
        reduction,
    )
    with full_precision(features.device):
        dtype = torch.float32
        for tensor in (features, weight, bias, covariance, epsilon, log_prior):
            if tensor is not None:
                dtype = torch.promote_types(dtype, tensor.dtype)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        labels = labels.long()
        valid = labels != ignore_index
        target = torch.where(valid, labels, 0)
        logits = F.linear(features, weight, bias)
        adjusted = logits
        if epsilon is not None:
            sign = _perturbation_sign(logits, weight, target)
            adjusted = F.linear(features + epsilon[:, None].to(dtype) * sign, weight, bias)
        if covariance is not None:
            adjusted = adjusted + alpha * _isda_quadratic(weight, covariance.to(dtype), target)
        if log_prior is not None:
            adjusted = adjusted + beta * log_prior.to(dtype)
        losses = F.cross_entropy(adjusted, target, reduction="none")
        losses = torch.where(valid, losses, 0.0)
        if reduction == "none":
            return losses
        return losses.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)


def _perturbation_sign(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """s (N, A), in the form that does not cancel on confident samples, see docs/kernels.md."""
    if len(weight) == 1:
        return weight.new_zeros(len(logits), weight.shape[1])
    with torch.no_grad():
        others = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
        return torch.sign(others @ weight - weight[labels])


def _isda_quadratic(weight: Tensor, covariance: Tensor, labels: Tensor) -> Tensor:
    """ρ (N, C) as ISDA computes it; the diagonal form as its ImageNet variant does."""
    count, (num_classes, width) = len(labels), weight.shape
    weights = weight.expand(count, num_classes, width)
    index = labels.view(count, 1, 1).expand(count, num_classes, width)
    difference = weights - weights.gather(1, index)  # N×C×A
    sigma = covariance[labels]
    if covariance.dim() == 2:
        return 0.5 * (difference.square() * sigma[:, None, :]).sum(dim=2)
    product = difference @ sigma @ difference.mT  # N×A×A gathered, N×C×C product
    eye = torch.eye(num_classes, dtype=weight.dtype, device=weight.device)
    return 0.5 * (product * eye).sum(dim=2)
