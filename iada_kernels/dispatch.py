"""Which backend serves a call.

`None` takes the best one for the device, and says so once where torch operators stand in for it; a
name insists, and fails loudly if it cannot serve.
"""

import importlib.util
import os
import sys
import warnings

import torch

from iada_kernels import native, torch_ops
from iada_kernels.contract import Backend, LossInputs, LossOptions
from iada_kernels.native import library

PACKAGES = ("iada", "iada_kernels")
BACKENDS = ("torch", "native", "triton")
BEST = {"cpu": "native", "cuda": "triton"}  # by the kind of device; torch for all others

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class SlowBackendWarning(RuntimeWarning):
    """Torch operators stand in for faster kernels that this installation lacks; once a process."""


def select_backend(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    options: LossOptions | None = None,
    compact: bool = False,
) -> Backend:
    """The module that computes on `device` for features of `dtype`, with these options.

    Examples:
        >>> iada_kernels.select_backend("torch", torch.device("cpu")).__name__
        'iada_kernels.torch_ops'

    Args:
        name: one of `BACKENDS`, to insist on it; None for the best one for the device.
        device: of the tensors.
        dtype: of the features.
        options: of the loss, some of which only torch operators serve.
        compact: whether it is for a low-rank or triangle Σ: products of matrices, which are torch's
            under any name.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot serve; the message says why.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}; "
            "pass one of these"
        )
    chosen = name or BEST.get(device.type, "torch")
    reason = _why_not(chosen, device, dtype)
    smoothed = options is not None and options.label_smoothing
    if smoothed and chosen != "torch" and not reason:
        reason = "label_smoothing is served by torch operators"
    if not reason:
        if compact:
            return torch_ops
        if chosen == "triton":
            return triton_backend()
        return native if chosen == "native" else torch_ops
    if name is not None:
        raise RuntimeError(
            f"backend: {name!r} cannot serve tensors on {device}: {reason}; "
            "use backend=None or backend='torch'"
        )
    if dtype in DTYPES and not (compact or smoothed):  # else there is nothing to install
        _warn_once(chosen, device.type)
    return torch_ops


def backend_for(inputs: LossInputs, options: LossOptions | None, name: str | None) -> Backend:
    """`select_backend` for a loss of these inputs."""
    h, compact = inputs.features, inputs.has_compact_covariance
    return select_backend(name, h.device, h.dtype, options, compact)


def served_by(name: str | None, device: torch.device) -> str:
    """What serves, for tables and records: "native avx512", or "torch operators" and why."""
    reason = ""
    if name is None:
        name = BEST.get(device.type, "torch")
        reason = _why_not(name, device, torch.float32)
    if name == "torch" or reason:
        return f"torch operators ({name}: {reason})" if reason else "torch operators"
    return f"native {native.instruction_set()}" if name == "native" else name


def triton_backend() -> Backend:
    """Imported when it is first needed: importing triton takes a while, and CPUs do without."""
    from iada_kernels import triton

    return triton


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot serve, or nothing."""
    if name == "torch":
        return ""
    if name == "native":
        if not native.is_available():
            return library.WHY_MISSING
        if device.type != "cpu":
            return "it computes on CPUs only"
    elif not HAS_TRITON:
        return "triton is not installed"
    elif device.type == "cpu" and not INTERPRETED:
        return (
            "its kernels run on GPUs, and on CPUs only with TRITON_INTERPRET=1 in the environment"
        )
    elif device.type not in ("cpu", "cuda"):
        return "it computes on NVIDIA and AMD GPUs only"
    return "" if dtype in DTYPES else f"it reads no features of {dtype}"


_warned: set[str] = set()


def _warn_once(name: str, kind: str) -> None:
    """Say that torch operators stand in for backend `name` on devices of this kind.

    Not where they were chosen, nor where there is nothing to install.
    """
    if name in _warned:
        return
    reason, remedy = "triton is not installed", "pip install 'iada[triton]'"
    if name == "native":
        if library.IS_TURNED_OFF or not library.IS_BUILT_HERE:
            return
        reason, remedy = library.WHY_MISSING, library.REMEDY
    warnings.warn(
        f"torch operators stand in for iada's {name} kernels on {kind} tensors and take several "
        f"times as long: {reason}. {remedy}",
        SlowBackendWarning,
        stacklevel=_levels_to_the_caller(),
    )
    _warned.add(name)


def _levels_to_the_caller() -> int:
    """The `stacklevel` at which `_warn_once` blames the first frame outside these packages."""
    levels, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in PACKAGES:
        levels, frame = levels + 1, frame.f_back
    return levels


# As torch.compiler.assume_constant_result marks what runs once, while a graph is traced, which a
# warning cannot be part of; the function itself would import the whole compiler here.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
