"""Light: more of it, less contrast, and fog."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

AIRLIGHT = 0.9  # what is seen where fog lets nothing through
_GRIDS = (2, 4, 8, 16)  # of the fog's clouds, from coarse to fine, each half as strong


def brightness(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: what is added to values in [0, 1]; nothing is drawn."""
    return images + amount


def contrast(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the share that is left of each value's distance to its image's mean."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + amount * (images - mean)


def fog(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the share of light that the thickest fog of an image keeps back; elsewhere half so.

    Clouds are drawn for each image, as noise on finer and finer grids.
    """
    count, _, height, width = images.shape
    clouds = torch.zeros(count, 1, height, width)
    for octave, size in enumerate(_GRIDS):
        noise = rng.standard_normal((count, 1, size, size), dtype=np.float32)
        layer = F.interpolate(
            torch.from_numpy(noise), (height, width), mode="bilinear", align_corners=False
        )
        clouds += layer / 2**octave
    low, high = clouds.amin(dim=(2, 3), keepdim=True), clouds.amax(dim=(2, 3), keepdim=True)
    lost = amount * (0.5 + 0.5 * (clouds - low) / (high - low))
    return images * (1 - lost) + AIRLIGHT * lost
