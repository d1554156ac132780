"""Image files as a trainer takes them: read, cut to size, and normalised."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iada.experiments.datasets.counter_rng import draws
from iada.experiments.datasets.images import open_image, pixels
from iada.experiments.datasets.labelled import Labelled
from iada.experiments.datasets.memory_view import IMAGENET, Normalisation
from iada.experiments.datasets.view import View
from iada.utils.checks import check_choice, refusal

_FINE = 2**30  # steps of a draw that stands for a real number in [0, 1)
_TRIES = 10
SHAPES = ("crop", "square", "whole")


class FileView(View):
    """Normalised float32 images (N, 3, size, size) of image files, with labels and index.

    Args:
        data: image files.
        augment: whether to cut a random part out of each image (an area of `scale`, sides of 3:4 to
            4:3) and flip half of them sideways. Otherwise the middle is taken.
        size: pixels a side of what comes out.
        shape: how the middle is taken: "crop" scales the shorter side to size · 8/7 and cuts;
            "square" scales both sides to that first, as the Waterbirds protocol does; "whole"
            takes the largest square in the middle, as the CelebA protocol does.
        scale: the share of the area that a random part has.
        normalise: mean and deviation of each channel, of values in [0, 1].
    """

    def __init__(
        self,
        data: Labelled,
        augment: bool = False,
        size: int = 224,
        shape: str = "crop",
        scale: tuple[float, float] = (0.08, 1.0),
        normalise: Normalisation = IMAGENET,
    ) -> None:
        if isinstance(data.inputs, Tensor) or (len(data) and isinstance(data.inputs[0], str)):
            raise refusal("data", "image files", "others", "use MemoryView or TextView")
        check_choice("shape", shape, SHAPES)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise refusal("scale", "0 < low ≤ high ≤ 1", repr(scale), "pass shares of the area")
        self.files, self.labels = data.inputs, data.labels
        self.augments, self.size, self.shape, self.scale = augment, size, shape, scale
        self.mean, self.deviation = (torch.tensor(values).view(-1, 1, 1) for values in normalise)

    def whole_batch(
        self, seed: int, step: int, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and index of these samples at this step: see `WholeBatches`."""
        rows = torch.as_tensor(indices)
        bounds = (_FINE,) * (2 * _TRIES + 2) + (2,)
        chances = torch.stack(draws(seed, step, rows, bounds), dim=1).tolist()
        images = [
            self._image(index, chance) for index, chance in zip(indices, chances, strict=True)
        ]
        return torch.stack(images), self.labels[rows], rows

    def _image(self, index: int, chance: list[int]) -> Tensor:
        image = open_image(self.files[index])  # type: ignore[arg-type]
        if self.augments:
            box = random_part(image.width, image.height, self.scale, [c / _FINE for c in chance])
        else:
            box = middle(image.width, image.height, self.shape)
        scaled = pixels(image.resize((self.size, self.size), _bilinear(), box=box))
        if self.augments and chance[-1]:
            scaled = scaled.flip(2)
        return (scaled.float() / 255 - self.mean) / self.deviation


def random_part(
    width: int, height: int, scale: tuple[float, float], chances: Sequence[float]
) -> tuple[float, float, float, float]:
    """A box (left, upper, right, lower) of a random area and aspect that lies in the image.

    `chances` are numbers in [0, 1): two for each of ten tries, two for the place. The middle, if
    no try fits.
    """
    for area, aspect in zip(chances[0 : 2 * _TRIES : 2], chances[1 : 2 * _TRIES : 2], strict=True):
        pixels_in = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        across, along = round(math.sqrt(pixels_in * ratio)), round(math.sqrt(pixels_in / ratio))
        if 0 < across <= width and 0 < along <= height:
            left = int(chances[2 * _TRIES] * (width - across + 1))
            upper = int(chances[2 * _TRIES + 1] * (height - along + 1))
            return left, upper, left + across, upper + along
    return middle(width, height, "whole")


def middle(width: int, height: int, shape: str) -> tuple[float, float, float, float]:
    """A box (left, upper, right, lower) around the middle: see `FileView` for the shapes."""
    share = 1.0 if shape == "whole" else 7 / 8
    shorter = min(width, height)
    across = share * (width if shape == "square" else shorter)
    along = share * (height if shape == "square" else shorter)
    left, upper = (width - across) / 2, (height - along) / 2
    return left, upper, left + across, upper + along


def _bilinear() -> "Resampling":
    from PIL import Image

    return Image.Resampling.BILINEAR


if TYPE_CHECKING:
    from PIL.Image import Resampling
