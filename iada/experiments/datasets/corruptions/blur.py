"""Blurs: out of focus, in motion, and zoomed while the shutter is open.

Lengths are pixels of an image of 32 pixels a side; they grow with larger images.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
_FINE = 8  # parts of a pixel that a disc's edge is told by
_POINTS = 4  # of a line, a pixel
_IMAGES = 2  # of a zoom, a pixel that its edge moves


def pixels_of(images: Tensor, amount: float) -> float:
    """A length given for images of 32 pixels a side, in pixels of these."""
    return amount * max(1.0, min(images.shape[-2:]) / SIDE)


def defocus_blur(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the radius of the disc that a point becomes; nothing is drawn."""
    radius = pixels_of(images, amount)
    reach = math.ceil(radius)
    parts = (torch.arange((2 * reach + 1) * _FINE) + 0.5) / _FINE - reach - 0.5
    disc = (parts[:, None] ** 2 + parts**2 <= radius**2).float()
    kernel = F.avg_pool2d(disc[None, None], _FINE)
    return _filtered(images, (kernel / kernel.sum()).expand(images.shape[1], -1, -1, -1))


def motion_blur(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the length of the line that a point becomes, its direction drawn for each image."""
    length = pixels_of(images, amount)
    reach = math.ceil(length / 2)
    angle = torch.from_numpy(rng.uniform(0, math.pi, len(images))).float()
    along = torch.linspace(-length / 2, length / 2, 2 * reach * _POINTS + 1)
    place = torch.arange(-reach, reach + 1)
    # Each point is shared among the pixels next to it: (n, points, pixels) by axis.
    x, y = (
        (1 - (turn[:, None, None] * along[:, None] - place).abs()).clamp(min=0)
        for turn in (angle.cos(), angle.sin())
    )
    kernel = torch.einsum("npi,npj->nij", y, x)
    kernel = kernel / kernel.sum(dim=(1, 2), keepdim=True)
    kernels = kernel.repeat_interleave(images.shape[1], dim=0)[:, None]
    return _filtered(images.flatten(0, 1)[None], kernels).view_as(images)


def zoom_blur(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: how many times larger the last of the images is that are averaged; nothing is drawn.

    The first one is the image itself.
    """
    farthest = (amount - 1) * min(images.shape[-2:]) / 2  # pixels that an edge moves
    total = torch.zeros_like(images)
    factors = torch.linspace(1, amount, 2 + math.ceil(_IMAGES * farthest)).tolist()
    for factor in factors:
        matrix = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]])
        grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), False)
        total += F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return total / len(factors)


def _filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Each channel with its kernel (channels, 1, K, K), the edge going on beyond itself."""
    reach = kernels.shape[-1] // 2
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(padded, kernels, groups=images.shape[1])
