"""A data set as a trainer takes it: images in memory, image files, texts, or a backbone's features.

Each view makes whole batches, `iada.utils.loading.WholeBatches`.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iada.experiments.datasets.augment import (
    PADDINGS,
    auto_augment,
    contrastive,
    crop_flip,
    cutout,
)
from iada.experiments.datasets.counter_rng import draws
from iada.experiments.datasets.files import missing, required
from iada.experiments.datasets.images import open_image, scaled_part
from iada.experiments.datasets.labelled import Labelled
from iada.utils.checks import argument_error, check_choice
from iada.utils.loading import WholeBatch, as_rows

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel
Range = tuple[float, float]
Tokenizer = Callable[..., Any]
Box = tuple[float, float, float, float]  # left, upper, right, lower

CIFAR10: Normalisation = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: Normalisation = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATIONS: dict[str, Normalisation] = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    # Of the codes of MetaSAug and Meta-Weight-Net, for CIFAR-10 and -100.
    "metasaug": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "imagenet": IMAGENET,
    # Of the codes of cRT and MetaSAug.
    "inaturalist18": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
AUGMENTATIONS = (None, "crop-flip", "autoaugment-cutout", "autoaugment-contrastive")
SHAPES = ("crop", "square", "whole")
_FINE = 2**30  # steps of a draw that stands for a real number in [0, 1)
_TRIES = 10


class View(Dataset):
    """Whole batches of samples, and one sample at a time; subclasses give `inputs`.

    Attributes:
        labels: (N), where batches are made.
        groups: (N), of data that has them; for the methods that know groups.
        in_memory: whether batches are made quickly enough to be made in the training process.
        augments: whether a sample depends on what is drawn.
    """

    labels: Tensor
    groups: Tensor | None
    in_memory: bool = False
    augments: bool = False

    def inputs(self, seed: int, step: int, rows: Tensor) -> Any:
        """The inputs of the samples `rows`, (n), at this step of the run."""
        raise NotImplementedError

    def whole_batch(self, seed: int, step: int, indices: Sequence[int]) -> WholeBatch:
        """Inputs, labels and index of these samples at this step: see `WholeBatches`."""
        rows = as_rows(indices)
        if self.labels.is_cuda:
            rows = rows.pin_memory().to(self.labels.device, non_blocking=True)
        return self.inputs(seed, step, rows), self.labels[rows], rows

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One sample; what its augmentation draws follows torch's global generator."""
        step = int(torch.randint(2**62, ())) if self.augments else 0
        inputs, labels, _ = self.whole_batch(0, step, [index])
        if isinstance(inputs, Mapping):
            return {name: values[0] for name, values in inputs.items()}, int(labels[0])
        return inputs[0], int(labels[0])


class MemoryView(View):
    """Normalised float32 images (N, C, H, W) of images in memory, with labels and index.

    Args:
        data: images in memory.
        normalise: mean and deviation of each channel, of values in [0, 1].
        augment: None; "crop-flip" (pad by 4, crop, flip); or "autoaugment-cutout", the same and
            then AutoAugment and CutOut, as the first stage of AFR's experiments has it;
            "autoaugment-contrastive", that for half of the images, drawn at each step, and
            `contrastive` for the others, as CMO's code has it for 400 epochs. Both take some 2 ms
            for each image and are done on the CPU: give the trainer workers.
        plain_from: the step of the run from which these two are "crop-flip" alone, as in AFR's
            second stage; None for never.
        device: where to keep the images and make the batches; None leaves them where they are, as
            does AutoAugment.
        padding: of the crops, see `crop_flip`.

    Attributes:
        mean, deviation: of each channel, (C, 1, 1), on the CPU.
    """

    def __init__(
        self,
        data: Labelled,
        normalise: Normalisation,
        augment: str | None = None,
        plain_from: int | None = None,
        device: torch.device | str | None = None,
        padding: str = "black",
    ) -> None:
        if not isinstance(data.inputs, Tensor):
            got = f"a {type(data.inputs).__name__}"
            raise argument_error("data", "images in memory", got, "use FileView for image files")
        check_choice("augment", augment, AUGMENTATIONS)
        check_choice("padding", padding, PADDINGS)
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in normalise)
        channels = data.inputs.shape[1]
        if mean.shape[1] != channels or deviation.shape[1] != channels:
            got = f"{mean.shape[1]} and {deviation.shape[1]}"
            remedy = "one a channel"
            raise argument_error("normalise", f"{channels} means and deviations", got, remedy)
        learned = augment is not None and augment.startswith("autoaugment")
        self._policy = auto_augment() if learned else None
        size = (data.inputs.shape[2], data.inputs.shape[3])
        self._other = contrastive(size) if augment == "autoaugment-contrastive" else None
        leave = device is None or self._policy is not None
        self.images = data.inputs if leave else data.inputs.to(device)
        self.labels, self.groups = data.labels.to(self.images.device), data.groups
        self.mean, self.deviation = mean[0], deviation[0]
        self.scale = (1 / (255 * deviation)).to(self.images.device)
        self.shift = (-mean / deviation).to(self.images.device)
        self.plain_from, self.padding = plain_from, padding
        self.augments = augment is not None
        self.in_memory = self._policy is None  # AutoAugment is slow

    def inputs(self, seed: int, step: int, rows: Tensor) -> Tensor:
        """(n, C, H, W)."""
        images = plain = self.images[rows]
        if self.augments:
            images = crop_flip(images, seed, step, rows, self.padding)
        if self._policy is not None and (self.plain_from is None or step < self.plain_from):
            images = cutout(self._policy(images, seed, step, rows.tolist()), seed, step, rows)
            if self._other is not None:
                others = draws(seed, step, rows, (1,) * 5 + (2,))[-1] == 1
                places = rows[others].tolist()
                images[others] = self._other(plain[others], seed, step, places)
        return images.float().mul_(self.scale).add_(self.shift)


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
        photo: see `open_image`.
    """

    def __init__(
        self,
        data: Labelled,
        augment: bool = False,
        size: int = 224,
        shape: str = "crop",
        scale: Range = (0.08, 1.0),
        normalise: Normalisation = IMAGENET,
        photo: bool = False,
    ) -> None:
        if isinstance(data.inputs, Tensor) or (len(data) and isinstance(data.inputs[0], str)):
            raise argument_error("data", "image files", "others", "use MemoryView or TextView")
        check_choice("shape", shape, SHAPES)
        if not 0 < scale[0] <= scale[1] <= 1:
            remedy = "pass shares of the area"
            raise argument_error("scale", "0 < low ≤ high ≤ 1", repr(scale), remedy)
        self.files, self.photo = data.inputs, photo
        self.labels, self.groups = data.labels, data.groups
        self.augments, self.size, self.shape, self.scale = augment, size, shape, scale
        self.mean, self.deviation = (torch.tensor(values).view(-1, 1, 1) for values in normalise)

    def inputs(self, seed: int, step: int, rows: Tensor) -> Tensor:
        """(n, 3, size, size)."""
        bounds = (_FINE,) * (2 * _TRIES + 2) + (2,)
        chances = torch.stack(draws(seed, step, rows, bounds), dim=1).tolist()
        return torch.stack(
            [self._image(*pair) for pair in zip(rows.tolist(), chances, strict=True)]
        )

    def _image(self, index: int, chance: list[int]) -> Tensor:
        image = open_image(self.files[index], self.photo)  # type: ignore[arg-type]
        if self.augments:
            box = random_part(image.width, image.height, self.scale, [c / _FINE for c in chance])
        else:
            box = middle(image.width, image.height, self.shape)
        scaled = scaled_part(image, box, self.size)
        if self.augments and chance[-1]:
            scaled = scaled.flip(2)
        return (scaled.float() / 255 - self.mean) / self.deviation


def random_part(width: int, height: int, scale: Range, chances: Sequence[float]) -> Box:
    """A box of a random area and aspect that lies in the image.

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


def middle(width: int, height: int, shape: str) -> Box:
    """A box around the middle: see `FileView` for the shapes."""
    share = 1.0 if shape == "whole" else 7 / 8
    shorter = min(width, height)
    across = share * (width if shape == "square" else shorter)
    along = share * (height if shape == "square" else shorter)
    left, upper = (width - across) / 2, (height - along) / 2
    return left, upper, left + across, upper + along


class TextView(View):
    """Tokens of texts, {"input_ids", "attention_mask"} (N, T) each, with labels and index.

    Args:
        data: texts.
        tokenizer: as `load_tokenizer` returns it.
        max_length: tokens of a text that are kept; WILDS takes 300. A batch is padded to its
            longest text.
    """

    def __init__(self, data: Labelled, tokenizer: Tokenizer, max_length: int = 300) -> None:
        if isinstance(data.inputs, Tensor) or not all(isinstance(t, str) for t in data.inputs):
            raise argument_error("data", "texts", "others", "use MemoryView or FileView")
        self.texts, self.labels, self.groups = data.inputs, data.labels, data.groups
        self.tokenizer, self.max_length = tokenizer, max_length

    def inputs(self, seed: int, step: int, rows: Tensor) -> dict[str, Tensor]:
        """(n, T) each; nothing is drawn."""
        texts = [self.texts[index] for index in rows.tolist()]
        cut = {"padding": True, "truncation": True, "max_length": self.max_length}
        tokens = self.tokenizer(texts, return_tensors="pt", **cut)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder, such as a downloaded model; nothing is fetched."""
    hint = "texts are tokenised by transformers: pip install 'iada[paper]'"
    transformers = required("transformers", hint)
    folder = Path(path)
    if not folder.is_dir():
        remedy = "pass a model's folder; to `paper`: --set model.backbone=transformers/FOLDER"
        raise missing(folder, "a folder with tokenizer.json or vocab.txt", remedy)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        expected = "a tokenizer's files (tokenizer.json, tokenizer_config.json)"
        raise argument_error(folder, expected, error, "download the model again") from error


class FeatureView(View):
    """Features (N, A) float32 as they are, with labels and index; on the device."""

    in_memory = True

    def __init__(self, data: Labelled, device: torch.device | str) -> None:
        if not isinstance(data.inputs, Tensor) or not data.inputs.is_floating_point():
            remedy = "use MemoryView, FileView or TextView"
            raise argument_error("data", "features (N, A)", "others", remedy)
        self.features, self.labels = data.inputs.to(device), data.labels.to(device)
        self.groups = data.groups

    def inputs(self, seed: int, step: int, rows: Tensor) -> Tensor:
        """(n, A); nothing is drawn."""
        return self.features.index_select(0, rows)
