"""Whether training has diverged, judged by the head and the covariances that it left behind."""

import torch
from torch import Tensor, nn

from iada.nn.class_covariance import ClassCovariance
from iada.utils.autocast import full_precision
from iada_kernels.torch_ops.quadratic import class_table

DWARFED = 100.0  # times the spread of logits; sound runs stay below 3
CLASSES = 256  # those with the largest covariances are looked at
NEGATIVE = -0.01  # of the largest trace: more than rounding, or one unsound step from zero, leaves


def check_divergence(head: nn.Linear, covariance: ClassCovariance, alpha: float) -> None:
    """FloatingPointError if training has diverged; waits for the device, so call it once an epoch.

    Examples:
        >>> covariance = iada.ClassCovariance(10, 64)
        >>> iada.check_divergence(head, covariance, alpha=0.5)

    A loss need not show it: −∞ logits of all other classes make it exactly 0. Signs are a head or Σ
    that is not finite, a Σ of negative trace, and a quadratic term α ρ of Eq. 6 a hundred times as
    large as the differences of the logits.

    Args:
        head: the classifier's last layer, with weight (C, A).
        covariance: Σ of its classes, with their means.
        alpha: of Eq. 6.

    Raises:
        FloatingPointError: training has diverged; the message has the sign and what to try.
    """
    sign = sign_of_divergence(head, covariance, alpha)
    if sign is not None:
        expected, got = sign
        raise FloatingPointError(
            f"training has diverged: expected {expected}, got {got}; go back to a state "
            "before, and lower lr or alpha, clip the gradient (clip_norm, "
            "torch.nn.utils.clip_grad_norm_), or let alpha rise from 0"
        )


@torch.no_grad()
def sign_of_divergence(
    head: nn.Linear, covariance: ClassCovariance, alpha: float
) -> tuple[str, str] | None:
    """What was expected and what came, or None."""
    sigma, mean = covariance.shrunk(), covariance.mean
    weight = head.weight.to(sigma.dtype)
    trace = covariance.variances.sum(dim=1)
    lowest, place = trace.min(dim=0)
    classes = trace.topk(min(CLASSES, len(trace))).indices
    with full_precision(sigma.device):
        shift = alpha * class_table(weight, sigma, classes).abs().amax()
        logits = mean[classes] @ weight.T
        if head.bias is not None:
            logits = logits + head.bias.to(sigma.dtype)
    spread = (logits.amax(dim=1) - logits.amin(dim=1)).amax()
    numbers: list[Tensor] = [lowest, place, trace.abs().amax(), shift, spread]
    found = torch.stack([number.double() for number in numbers])
    finite = torch.isfinite(found).all() & torch.isfinite(weight).all()
    low, number, size, shifted, differ, sound = [*found.tolist(), bool(finite)]
    if not sound:
        return "a finite head and covariance", "others"
    if low < NEGATIVE * size:
        return "covariances of positive trace", f"{low:.3g} for class {int(number)}"
    if shifted > DWARFED * (1 + differ):
        got = f"{shifted:.3g} where logits differ by {differ:.3g}"
        return f"a quadratic term (alpha={alpha:g}) of the size of the logits", got
    return None
