"""Augmentations of whole batches of small images, uint8 (N, C, H, W) to uint8."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.experiments.datasets.counter_rng import draws
from iada.experiments.datasets.files import required
from iada.utils.seeds import preserved, seed_host, seed_of

PAD = 4  # pixels on each side before a crop
PADDINGS = ("black", "reflect")
OneByOne = Callable[[Tensor, int, int, Sequence[int]], Tensor]  # images, seed, step, rows
HOLE = 16  # CutOut's square, pixels a side


def crop_flip(images: Tensor, seed: int, step: int, rows: Tensor, padding: str = "black") -> Tensor:
    """Pad by 4 pixels, crop back to size at a random place, flip half of them sideways.

    padding: "black", as in the codes of LDAM-DRW and CMO; "reflect", what lies beside the edge,
    as in those of MetaSAug, Meta-Weight-Net and RISDA.
    """
    count, channels, height, width = images.shape
    down, right, flip = draws(seed, step, rows, (2 * PAD + 1, 2 * PAD + 1, 2))
    across = torch.arange(width, device=images.device)
    across = torch.where(flip[:, None] == 1, width - 1 - across, across) + right[:, None]
    along = torch.arange(height, device=images.device) + down[:, None]
    position = along[:, :, None] * (width + 2 * PAD) + across[:, None, :]
    padded = _reflected(images) if padding == "reflect" else F.pad(images, (PAD, PAD, PAD, PAD))
    index = position.view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)


def _reflected(images: Tensor) -> Tensor:
    """(N, C, H + 2 PAD, W + 2 PAD); torch's own takes no uint8."""
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(-PAD, size + PAD, device=images.device).abs()
        images = images.index_select(dim, size - 1 - (size - 1 - place).abs())
    return images


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


def auto_augment() -> OneByOne:
    """AutoAugment with the policy found on CIFAR-10 (Cubuk et al., 2019), by kornia."""
    return _one_by_one(_kornia("kornia.augmentation.auto").AutoAugment("cifar10"))


def contrastive(size: tuple[int, int]) -> OneByOne:
    """Crops, colours, grey and blur as CMO's code has them for 400 epochs, by kornia.

    They are PaCo's, after SimCLR (Chen et al., 2020), the blur with a window of 9 pixels. size: H
    and W.
    """
    kornia = _kornia("kornia.augmentation")
    steps = (
        kornia.RandomResizedCrop(size, scale=(0.2, 1.0)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.RandomGaussianBlur((9, 9), (0.1, 2.0), p=0.5),
    )
    return _one_by_one(torch.nn.Sequential(*steps))


def _kornia(module: str) -> Any:
    hint = "AutoAugment needs kornia: pip install 'iada[paper]', or "
    hint += "pip install --no-deps kornia kornia-rs"
    return required(module, hint)


def _one_by_one(policy: Callable[[Tensor], Tensor]) -> OneByOne:
    """`policy` of float images in [0, 1], (1, C, H, W), for a batch of uint8 ones.

    kornia draws from torch's global generator, and AutoAugment one pair of operations for a whole
    batch: it is given the samples one by one, each with the seed of its place in the run.
    """

    def augmented(images: Tensor, seed: int, step: int, indices: Sequence[int]) -> Tensor:
        changed = torch.empty_like(images)
        with preserved(), torch.no_grad():
            for row, index in enumerate(indices):
                seed_host(seed_of(seed, step, index))
                image = policy(images[row : row + 1].float() / 255)
                changed[row] = (image[0] * 255).round().clamp(0, 255)
        return changed

    return augmented
