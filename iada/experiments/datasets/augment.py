"""Augmentations of whole batches of small images, uint8 (N, C, H, W) to uint8."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.experiments.datasets.counter_rng import draws
from iada.experiments.datasets.files import required
from iada.utils.seeds import preserved, seed_host, seed_of

PAD = 4  # pixels on each side before a crop, as the published CIFAR protocols have it
HOLE = 16  # CutOut's square, pixels a side


def crop_flip(images: Tensor, seed: int, step: int, rows: Tensor) -> Tensor:
    """Pad by 4 black pixels, crop back to size at a random place, flip half of them sideways."""
    count, channels, height, width = images.shape
    down, right, flip = draws(seed, step, rows, (2 * PAD + 1, 2 * PAD + 1, 2))
    across = torch.arange(width, device=images.device)
    across = torch.where(flip[:, None] == 1, width - 1 - across, across) + right[:, None]
    along = torch.arange(height, device=images.device) + down[:, None]
    position = along[:, :, None] * (width + 2 * PAD) + across[:, None, :]
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).flatten(2)
    index = position.view(count, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, index).view_as(images)


def cutout(images: Tensor, seed: int, step: int, rows: Tensor) -> Tensor:
    """A black square around a random pixel, cut off at the edges (DeVries and Taylor, 2017)."""
    *_, height, width = images.shape
    # The first three draws of a sample place its crop and its flip.
    *_, down, right = draws(seed, step, rows, (1, 1, 1, height, width))
    along = torch.arange(height, device=images.device) - down[:, None] + HOLE // 2
    across = torch.arange(width, device=images.device) - right[:, None] + HOLE // 2
    hole = _inside(along)[:, :, None] & _inside(across)[:, None, :]
    return images.masked_fill(hole[:, None], 0)


def _inside(distance: Tensor) -> Tensor:
    return (distance >= 0) & (distance < HOLE)


def auto_augment() -> Callable[[Tensor, int, int, Sequence[int]], Tensor]:
    """AutoAugment with the policy found on CIFAR-10 (Cubuk et al., 2019), by kornia.

    kornia draws from torch's global generator, and chooses one pair of operations for a whole
    batch: it is given the samples one by one, each with the seed of its place in the run.
    """
    hint = "augment='autoaugment-cutout' needs kornia: pip install 'iada[paper]', or "
    hint += "pip install --no-deps kornia kornia-rs"
    policy = required("kornia.augmentation.auto", hint).AutoAugment("cifar10")

    def augmented(images: Tensor, seed: int, step: int, indices: Sequence[int]) -> Tensor:
        changed = torch.empty_like(images)
        with preserved(), torch.no_grad():
            for row, index in enumerate(indices):
                seed_host(seed_of(seed, step, index))
                image = policy(images[row : row + 1].float() / 255)
                changed[row] = (image[0] * 255).round().clamp(0, 255)
        return changed

    return augmented
