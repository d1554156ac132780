"""What an image goes through after the camera: coarse pixels, JPEG, and a surface that bends."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iada.experiments.datasets.corruptions.blur import pixels_of
from iada.experiments.datasets.files import required

_GRID = 4  # places of an axis at which a bend is drawn


def pixelate(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the share of an axis's pixels that is left; nothing is drawn.

    Where it is no whole number of pixels that become one, some are larger by a pixel than others.
    """
    rows, columns = (_blocks(side, max(1, round(amount * side))) for side in images.shape[-2:])
    return rows @ images @ columns


def jpeg(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: Pillow's quality, 1 to 95; nothing is drawn. Of grey images or RGB."""
    Image = required("PIL.Image", "JPEG is written by Pillow: pip install 'iada[paper]'")
    levels = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    read = np.empty_like(levels)
    for row, image in enumerate(levels):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
            file, "JPEG", quality=int(amount)
        )
        with Image.open(file) as decoded:
            read[row] = np.asarray(decoded).reshape(image.shape)
    return torch.from_numpy(read).permute(0, 3, 1, 2).float() / 255


def elastic(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the standard deviation of a bend, in pixels of an image of 32 a side.

    Drawn at 4 × 4 places of each image, smooth between them.
    """
    count, _, height, width = images.shape
    drawn = rng.standard_normal((count, 2, _GRID, _GRID), dtype=np.float32)
    bend = F.interpolate(
        torch.from_numpy(drawn), (height, width), mode="bicubic", align_corners=False
    )
    half = torch.tensor([width / 2, height / 2])  # an image spans −1 to 1
    shift = pixels_of(images, amount) * bend.permute(0, 2, 3, 1) / half
    unmoved = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), False)
    return F.grid_sample(images, unmoved + shift, padding_mode="reflection", align_corners=False)


def _blocks(side: int, fewer: int) -> Tensor:
    """(side, side): makes each pixel the mean of its block, of so many on an axis."""
    block = torch.arange(side) * fewer // side
    together = (block[:, None] == block).float()
    return together / together.sum(dim=1, keepdim=True)
