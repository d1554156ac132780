"""Common corruptions of images, made here: of this project, not the published CIFAR-10-C.

The families are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019; how each is made and its amounts are this
project's own, so accuracies are not comparable with published ones. `published` reads those files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.corruptions.blur import defocus_blur, motion_blur, zoom_blur
from iada.experiments.datasets.corruptions.digital import elastic, jpeg, pixelate
from iada.experiments.datasets.corruptions.light import brightness, contrast, fog
from iada.experiments.datasets.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from iada.experiments.datasets.labelled import Labelled
from iada.utils.checks import argument_error, check_choice

# From values in [0, 1] (n, C, H, W) float32, an amount and a generator: values, of any range.
Corruption = Callable[[Tensor, float, np.random.Generator], Tensor]

SEVERITIES = 5
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.07, 0.10, 0.14, 0.18)),
    "shot_noise": (shot_noise, (300, 150, 80, 45, 25)),
    "impulse_noise": (impulse_noise, (0.01, 0.03, 0.06, 0.10, 0.16)),
    "defocus_blur": (defocus_blur, (0.8, 1.1, 1.4, 1.8, 2.3)),
    "motion_blur": (motion_blur, (2, 3.5, 5, 6.5, 8)),
    "zoom_blur": (zoom_blur, (1.06, 1.12, 1.18, 1.25, 1.33)),
    "brightness": (brightness, (0.08, 0.16, 0.24, 0.32, 0.40)),
    "contrast": (contrast, (0.75, 0.55, 0.40, 0.27, 0.17)),
    "fog": (fog, (0.20, 0.35, 0.50, 0.65, 0.80)),
    "pixelate": (pixelate, (0.80, 0.65, 0.50, 0.40, 0.30)),
    "jpeg_compression": (jpeg, (60, 40, 25, 15, 8)),
    "elastic_transform": (elastic, (0.6, 1.0, 1.5, 2.0, 2.6)),
}
_BLOCK = 500  # images at a time; each block has a generator of its own


def corrupted(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Images uint8 (N, C, H, W) on the CPU with one of CORRUPTIONS: as many, alike in kind.

    severity: 1 to 5. What is drawn follows from seed and name, and is the same for all severities.
    """
    check_choice("corruption", name, CORRUPTIONS)
    if severity not in range(1, SEVERITIES + 1):
        raise argument_error("severity", f"1 to {SEVERITIES}", repr(severity), "pass one")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        got = f"{images.dtype} {tuple(images.shape)}"
        remedy = "corruptions are for images in memory"
        raise argument_error("images", "uint8 (N, C, H, W), grey or RGB", got, remedy)
    corrupt, amounts = CORRUPTIONS[name]
    made = torch.empty_like(images)
    for first in range(0, len(images), _BLOCK):
        rng = np.random.default_rng([seed, first, *name.encode()])
        block = images[first : first + _BLOCK]
        values = corrupt(block.float() / 255, amounts[severity - 1], rng)
        made[first : first + _BLOCK] = (255 * values).round_().clamp_(0, 255)
    return made


@dataclass(frozen=True)
class MadeCorruptions:
    """A test set with each corruption at each severity."""

    test: Labelled
    seed: int = 0

    @property
    def about(self) -> dict[str, Any]:
        """How they were made, for a record."""
        amounts = {name: list(amounts) for name, (_, amounts) in CORRUPTIONS.items()}
        return {"source": "made", "seed": self.seed, "amounts": amounts}

    def __iter__(self) -> Iterator[tuple[str, Labelled]]:
        """(name, data), each name's severities in order."""
        images = self.test.inputs
        assert isinstance(images, Tensor)
        for name in CORRUPTIONS:
            for severity in range(1, SEVERITIES + 1):
                made = corrupted(images.cpu(), name, severity, self.seed)
                yield name, replace(self.test, inputs=made)
