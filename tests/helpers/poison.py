"""Fresh memory full of NaN, so that a kernel that leaves an element unwritten fails its test."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

INTEGER = -3  # as a size: nothing to do; as an index: wrong


def _value(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return torch.nan
    return INTEGER if dtype.is_signed else 0xFF  # bytes of anything: as floats NaN, as int −1


def poison_fresh_memory(monkeypatch, seen: Callable[[Tensor], None] = lambda tensor: None) -> None:
    """Fill whatever the Python of `iada_kernels` allocates uninitialised, and show it to `seen`."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filling(getattr(owner, name), seen))


def _filling(allocate, seen):
    def allocate_and_fill(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # a frame is nothing that can be traced
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("iada_kernels."):
            with _disable_current_modes():  # a trace would take it for the product's
                tensor.fill_(_value(tensor.dtype))
            seen(tensor)
        return tensor

    return allocate_and_fill
