"""The loss is computed in float32 or better, under autocast too."""

import contextlib

import torch

NOTHING = contextlib.nullcontext()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off on `device`, at no cost where it is off already."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return NOTHING
