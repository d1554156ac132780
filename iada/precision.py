"""The loss is computed in float32 or better, under autocast too."""

import contextlib

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off on `device`, at no cost where it is off already."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
