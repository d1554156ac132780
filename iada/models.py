"""The small backbones that the command line offers."""

from collections.abc import Sequence

import torch
from torch import nn


def mlp(
    num_inputs: int, hidden: Sequence[int], num_classes: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Sequential, nn.Linear]:
    """Backbone (N, num_inputs) → (N, hidden[-1]) of Linear and ReLU layers, and its head."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = num_inputs
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers).to(dtype), nn.Linear(width, num_classes).to(dtype)
