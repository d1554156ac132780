"""Finds and loads the compiled library, and remembers why not where that fails."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import torch

from iada_kernels.native import fakes
from iada_kernels.version import __version__

REQUIRED_BY = "IADA_REQUIRE_NATIVE"  # set: a missing library is an error
TAKEN_FROM = "IADA_NATIVE_LIBRARY"  # set: another build of it; "none": act as if there were none
CHOSEN_BY = "IADA_INSTRUCTION_SET"  # set: its variant for one of these, where the processor has it
INSTRUCTION_SETS = ("portable", "avx2", "avx512")

ARGUMENTS = {  # of each operator: a library of other sources may have others
    "loss_forward": 14,
    "loss_forward_update": 15,
    "loss_backward": 11,
    "covariance_update": 5,
    "hypergradient": 15,
    "covariance_step": 8,
    "characteristics": 5,
    "arguments_fit": 9,
}
BUILD = (
    "In a clone of iada, in the environment that has torch: pip install scikit-build-core cmake "
    "ninja && pip install --no-build-isolation --no-deps --force-reinstall ."
)
IS_BUILT_HERE = sys.platform != "win32"  # the sources are written for gcc and clang
IS_TURNED_OFF = os.environ.get(TAKEN_FROM) == "none"


def _load() -> tuple[str | None, str, str]:
    """(path of the library, why it is missing, what helps): the first, or the two others."""
    if IS_TURNED_OFF:
        return None, f"{TAKEN_FROM} turns it off", f"Unset {TAKEN_FROM}"
    path = os.environ.get(TAKEN_FROM)
    if path:
        path = os.path.abspath(path)  # a loader looks for bare names elsewhere; folders change
    else:
        spec = importlib.util.find_spec("iada_kernels._native")
        if spec is None or spec.origin is None:
            return None, *_why_not_here()
        path = spec.origin
    try:
        torch.ops.load_library(path)
    except OSError as error:  # built for another machine, or for a newer torch
        return None, f"{path} does not load: {error}", BUILD
    for name, count in ARGUMENTS.items():
        operator = getattr(torch.ops.iada_native, name, None)
        if operator is None or len(operator.default._schema.arguments) != count:
            wanted = f"{name} of {count} arguments"
            return None, f"{path} is of another version: it has no {wanted}", BUILD
    return path, "", ""


def _why_not_here() -> tuple[str, str]:
    """Not built, or built and installed but hidden by a folder of sources that comes before it.

    What is installed is not taken from there: it may be of other sources than these.
    """
    here = Path(__file__).parents[1]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution("iada")
        for file in installed.files or ():
            path = Path(str(file.locate()))
            if file.name == "_native.so" and path.is_file() and installed.version == __version__:
                return (
                    f"{here} has none and hides the installed one",
                    f"Run from another folder, install with pip install -e, or, if it was built "
                    f"from these sources, set {TAKEN_FROM}={path}",
                )
    return "it was not built (no C++ compiler or no torch at install time?)", BUILD


PATH, WHY_MISSING, REMEDY = _load()
if PATH is None and os.environ.get(REQUIRED_BY, "0") not in ("", "0"):
    raise ImportError(f"{REQUIRED_BY}: the native CPU library is required; {WHY_MISSING}. {REMEDY}")
if (_wish := os.environ.get(CHOSEN_BY)) and _wish not in INSTRUCTION_SETS:
    _names = ", ".join(map(repr, INSTRUCTION_SETS))
    raise ValueError(f"{CHOSEN_BY}: expected one of {_names}, got {_wish!r}; set one, or unset it")
if PATH is not None:
    # Called under autograd.Function only: without this, torch's fallback looks for requires_grad at
    # every call.
    _autograd = torch.library.Library("iada_native", "IMPL", "Autograd")
    for _operator in ARGUMENTS:
        _autograd.impl(_operator, torch.library.fallthrough_kernel)
    for _operator, _fake in fakes.FAKES.items():
        torch.library.register_fake(f"iada_native::{_operator}", _fake)


def is_available() -> bool:
    """Whether the compiled library is loaded; else WHY_MISSING says why not."""
    return PATH is not None


def instruction_set() -> str:
    """Which of the compiled variants serves on this processor: "portable", "avx2" or "avx512"."""
    name = ctypes.CDLL(PATH).iada_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
