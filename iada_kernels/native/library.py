"""Finds and loads the compiled library, and remembers why not where that fails."""

import ctypes
import importlib.util
import os

import torch

REQUIRED_BY = "IADA_REQUIRE_NATIVE"


def _load() -> tuple[str | None, str]:
    """(path of the library, why it is missing): one of the two."""
    spec = importlib.util.find_spec("iada_kernels._native")
    if spec is None or spec.origin is None:
        return None, "it was not built (no C++ compiler at install time?)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:  # built for another machine, or for a newer torch
        return None, f"{spec.origin} does not load: {error}"
    return spec.origin, ""


PATH, WHY_MISSING = _load()
if PATH is None and os.environ.get(REQUIRED_BY, "0") not in ("", "0"):
    raise ImportError(f"the native CPU library is required ({REQUIRED_BY}) and {WHY_MISSING}")


def is_available() -> bool:
    return PATH is not None


def instruction_set() -> str:
    """Which of the compiled variants serves on this processor: "portable", "avx2" or "avx512"."""
    name = ctypes.CDLL(PATH).iada_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
