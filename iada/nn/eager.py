"""The eager implementation that people have today, kept as the yardstick for swaps and benches."""

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.nn.arguments import Extras, loss_of_rows
from iada.nn.class_covariance import ClassCovariance
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.low_rank import LowRankCovariance, unfolded


def eager_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    covariance: Tensor | LowRankCovariance | ClassCovariance | None = None,
    epsilon: Tensor | None = None,
    log_prior: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_logits: bool = False,
) -> Tensor:
    """The IADA loss (Eq. 6) in the style of the published ISDA and MetaSAug code.

    Builds the N×C×A differences, gathers a covariance for every sample (N×A×A), and takes the
    diagonal of an N×C×C product; autograd does the rest. Arguments, result and errors are those
    of `iada.fused_loss`, which computes the same thing without these temporaries and has one
    argument more, `backend`.

    Examples:
        >>> arguments = (features, head.weight, head.bias, labels)
        >>> torch.allclose(iada.eager_loss(*arguments), iada.fused_loss(*arguments))
        True
    """
    inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)  # type: ignore[arg-type]
    options = LossOptions(alpha, beta, ignore_index, reduction, label_smoothing)
    return loss_of_rows(_compute, inputs, options, Extras(class_weight, row_weight, return_logits))


def _compute(inputs: LossInputs, options: LossOptions) -> Tensor:
    dtype = inputs.compute_dtype
    features, weight = inputs.features.to(dtype), inputs.weight.to(dtype)
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    valid = inputs.labels != options.ignore_index
    target = torch.where(valid, inputs.labels, 0)
    adjusted = logits = F.linear(features, weight, bias)
    if inputs.epsilon is not None:
        shift = inputs.epsilon[:, None].to(dtype) * _perturbation_sign(logits, weight, target)
        adjusted = F.linear(features + shift, weight, bias)
    if inputs.covariance is not None:
        sigma = unfolded(inputs.covariance, weight.shape[1])
        quadratic = _isda_quadratic(weight, sigma.to(dtype), target)
        adjusted = adjusted + options.alpha * quadratic
    if inputs.log_prior is not None:
        adjusted = adjusted + options.beta * inputs.log_prior.to(dtype)
    smoothing = options.label_smoothing
    losses = F.cross_entropy(adjusted, target, reduction="none", label_smoothing=smoothing)
    losses = torch.where(valid, losses, 0.0)
    if options.reduction == "none":
        return losses
    return losses.sum() / (valid.sum().clamp(min=1) if options.reduction == "mean" else 1)


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
