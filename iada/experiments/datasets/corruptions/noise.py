"""Noise of single values: Gaussian, of counted photons, and of values that are lost."""

import numpy as np
import torch
from torch import Tensor


def gaussian_noise(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the standard deviation, of values in [0, 1]."""
    drawn = rng.standard_normal(tuple(images.shape), dtype=np.float32)
    return images + amount * torch.from_numpy(drawn)


def shot_noise(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: photons that a value of 1 stands for; each value is a Poisson count of them."""
    counts = rng.poisson(amount * images.numpy().astype(np.float64))
    return torch.from_numpy((counts / amount).astype(np.float32))


def impulse_noise(images: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """amount: the share of values that become 0 or 1."""
    struck, bright = rng.random((2, *images.shape), dtype=np.float32)
    lost = torch.from_numpy((bright < 0.5).astype(np.float32))
    return torch.where(torch.from_numpy(struck < amount), lost, images)
