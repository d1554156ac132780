"""Images whose features are given: gradient descent on pixels, with a prior for smooth ones.

After Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR
2015. Many images share a feature. What comes out is one of them, as the prior and the start have
it: it shows what the backbone keeps of an image, and is not an image that anyone has taken.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iada.utils.checks import argument_error, check_count
from iada.utils.evaluate import evaluating

STEPS = 300
# Weight of the total variation, at the first step and at the last: large shapes come first. Chosen
# by eye on a ResNet-32 of CIFAR-10; with 0.003 throughout, what comes out looks like noise.
SMOOTHNESS = (10.0, 0.1)
RATE = 0.1  # Adam's on values in [0, 1]; falls to 0 over the steps
_SPREAD = 0.01  # of the noise around grey that it starts from


class Inverted(NamedTuple):
    """Images (M, C, H, W) with values in [0, 1]; and how far their features are off.

    residual: ‖f(x) − target‖, (M), in units of the features. start: the same before the first step.
    """

    images: Tensor
    residual: Tensor
    start: Tensor


def invert(
    backbone: nn.Module,
    targets: Tensor,
    shape: tuple[int, int, int],
    normalise: Callable[[Tensor], Tensor],
    *,
    steps: int = STEPS,
    smoothness: tuple[float, float] = SMOOTHNESS,
    rate: float = RATE,
    seed: int = 0,
) -> Inverted:
    """For each target (M, A) an image x with f(x) near it, f being the backbone in evaluation mode.

    Lowers ‖f(x) − target‖² / ‖target‖² + λ TV(x) by Adam, x kept in [0, 1]; TV is the mean absolute
    difference of neighbouring pixels, along both axes. All targets start from the same grey noise,
    so that what differs between images is due to their targets.

    Args:
        shape: (C, H, W) of an image.
        normalise: from values in [0, 1] to what the backbone takes.
        smoothness: λ at the first step and at the last, in equal ratios between.
        seed: of the noise.

    Parameters, buffers, their gradients and the modes of the backbone's modules stay as they are.
    """
    check_count("steps", steps, 1, f"{STEPS} is usual")
    if min(smoothness) <= 0:
        raise argument_error("smoothness", "weights above 0", smoothness, f"{SMOOTHNESS} is usual")
    if targets.dim() != 2 or not len(targets):
        got = f"shape {tuple(targets.shape)}"
        raise argument_error("targets", "features (M, A), at least one", got, "pass some")
    targets = targets.float()
    scale = targets.square().sum(dim=1).clamp(min=torch.finfo(targets.dtype).tiny)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    images = (0.5 + _SPREAD * noise).clamp(0, 1).to(targets.device)
    images = images.expand(len(targets), *shape).clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
    start: Tensor | None = None
    with evaluating(backbone), torch.enable_grad():
        for step in range(steps):
            weight = smoothness[0] * (smoothness[1] / smoothness[0]) ** (step / steps)
            off = (backbone(normalise(images)) - targets).square().sum(dim=1)
            start = off.detach().sqrt() if start is None else start
            loss = (off / scale + weight * total_variation(images)).sum()
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        with torch.no_grad():
            off = (backbone(normalise(images)) - targets).square().sum(dim=1)
    assert start is not None
    return Inverted(images.detach(), off.sqrt(), start)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, along both axes: (M) of (M, C, H, W)."""
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.mean(dim=(1, 2, 3)) + across.mean(dim=(1, 2, 3))
