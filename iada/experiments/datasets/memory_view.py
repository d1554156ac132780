"""Images in memory as a trainer takes them: normalised, and augmented by whole batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from iada.experiments.datasets.augment import auto_augment, crop_flip, cutout
from iada.experiments.datasets.labelled import Labelled
from iada.experiments.datasets.view import View
from iada.utils.checks import refusal

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel

CIFAR10: Normalisation = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: Normalisation = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AUGMENTATIONS = (None, "crop-flip", "autoaugment-cutout")


class MemoryView(View):
    """Normalised float32 images (N, C, H, W) of images in memory, with labels and index.

    Args:
        data: images in memory.
        normalise: mean and deviation of each channel, of values in [0, 1].
        augment: None; "crop-flip" (pad by 4, crop, flip); or "autoaugment-cutout", the same and
            then AutoAugment and CutOut, as the first stage of AFR's experiments has it. That takes
            some 2 ms for each image and is done on the CPU: give the trainer workers.
        plain_from: the step of the run from which "autoaugment-cutout" is "crop-flip" alone, as in
            AFR's second stage; None for never.
        device: where to keep the images and make the batches; None leaves them where they are, as
            does AutoAugment.
    """

    def __init__(
        self,
        data: Labelled,
        normalise: Normalisation,
        augment: str | None = None,
        plain_from: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(data.inputs, Tensor):
            got = f"a {type(data.inputs).__name__}"
            raise refusal("data", "images in memory", got, "use FileView for image files")
        if augment not in AUGMENTATIONS:
            expected = f"one of {', '.join(map(repr, AUGMENTATIONS))}"
            raise refusal("augment", expected, repr(augment), "pass one of these")
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in normalise)
        channels = data.inputs.shape[1]
        if mean.shape[1] != channels or deviation.shape[1] != channels:
            got = f"{mean.shape[1]} and {deviation.shape[1]}"
            raise refusal("normalise", f"{channels} means and deviations", got, "one a channel")
        self._policy = auto_augment() if augment == "autoaugment-cutout" else None
        leave = device is None or self._policy is not None
        self.images = data.inputs if leave else data.inputs.to(device)
        self.labels = data.labels.to(self.images.device)
        self.deviation = deviation.flatten()
        self.scale = (1 / (255 * deviation)).to(self.images.device)
        self.shift = (-mean / deviation).to(self.images.device)
        self.plain_from = plain_from
        self.augments = augment is not None
        self.in_memory = self._policy is None  # AutoAugment is slow

    def whole_batch(
        self, seed: int, step: int, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and index of these samples at this step: see `WholeBatches`."""
        rows = torch.as_tensor(indices)
        if self.images.is_cuda:
            rows = rows.pin_memory().to(self.images.device, non_blocking=True)
        images = self.images[rows]
        if self.augments:
            images = crop_flip(images, seed, step, rows)
        if self._policy is not None and (self.plain_from is None or step < self.plain_from):
            images = cutout(self._policy(images, seed, step, indices), seed, step, rows)
        inputs = images.float().mul_(self.scale).add_(self.shift)
        return inputs, self.labels[rows], rows
