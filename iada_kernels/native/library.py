"""Finds and loads the compiled library, and remembers why not where that fails."""

import ctypes
import importlib.util
import os

import torch

from iada_kernels.native import fakes

REQUIRED_BY = "IADA_REQUIRE_NATIVE"  # set: a missing library is an error
TAKEN_FROM = "IADA_NATIVE_LIBRARY"  # set: another build of it; "none": act as if there were none

OPERATORS = (
    "loss_forward",
    "loss_forward_update",
    "loss_backward",
    "covariance_update",
    "hypergradient",
    "covariance_step",
    "characteristics",
    "arguments_fit",
)


def _load() -> tuple[str | None, str]:
    """(path of the library, why it is missing): one of the two."""
    path = os.environ.get(TAKEN_FROM)
    if path == "none":
        return None, f"{TAKEN_FROM} turns it off"
    if path is None:
        spec = importlib.util.find_spec("iada_kernels._native")
        if spec is None or spec.origin is None:
            return None, "it was not built (no C++ compiler or no torch at install time?)"
        path = spec.origin
    try:
        torch.ops.load_library(path)
    except OSError as error:  # built for another machine, or for a newer torch
        return None, f"{path} does not load: {error}"
    absent = [name for name in OPERATORS if not hasattr(torch.ops.iada_native, name)]
    if absent:
        return None, f"{path} is of another version: it has no {absent[0]}; install iada again"
    return path, ""


PATH, WHY_MISSING = _load()
if PATH is None and os.environ.get(REQUIRED_BY, "0") not in ("", "0"):
    raise ImportError(f"{REQUIRED_BY}: the native CPU library is required; {WHY_MISSING}")
if PATH is not None:
    # Called under autograd.Function only: without this, torch's fallback looks for requires_grad at
    # every call.
    _autograd = torch.library.Library("iada_native", "IMPL", "Autograd")
    for _operator in OPERATORS:
        _autograd.impl(_operator, torch.library.fallthrough_kernel)
    fakes.register()


def is_available() -> bool:
    """Whether the compiled library is loaded; else WHY_MISSING says why not."""
    return PATH is not None


def instruction_set() -> str:
    """Which of the compiled variants serves on this processor: "portable", "avx2" or "avx512"."""
    name = ctypes.CDLL(PATH).iada_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
