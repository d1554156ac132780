"""The loss is computed in float32 or better, under autocast too."""

import contextlib

import torch

# Asked once: torch.compile of torch 2.11 cannot trace the question.
AUTOCAST_KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)
NOTHING = contextlib.nullcontext()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off on `device`, at no cost where it is off already."""
    kind = device.type
    if kind in AUTOCAST_KINDS and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return NOTHING
