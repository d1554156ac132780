"""Which backend serves a call.

`None` takes the best one for the device, and says so once where torch operators stand in for it; a
name insists, and fails loudly if it cannot serve.
"""

import importlib.util
import os
import shutil
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


LEAST_CAPABILITY = (8, 0)  # of NVIDIA GPUs, that Triton supports: Ampere and later
INSTALL = {  # what is missing, as `why_not` has it, and the remedy
    "triton is not installed": "pip install 'iada[triton]'",
    "Triton builds its launchers with a C compiler, and found none": (
        "Install gcc or clang, or name one in CC"
    ),
}
NO_TRITON, NO_COMPILER = INSTALL


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
    reason = why_not(chosen, device, dtype)
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
        _warn_once(chosen, device.type, reason)
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
        reason = why_not(name, device, torch.float32)
    if name == "torch" or reason:
        return f"torch operators ({name}: {reason})" if reason else "torch operators"
    return f"native {native.instruction_set()}" if name == "native" else name


def triton_backend() -> Backend:
    """Imported when it is first needed: importing triton takes a while, and CPUs do without."""
    from iada_kernels import triton

    return triton


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot serve, or nothing."""
    if name == "torch":
        return ""
    if name == "native":
        if not native.is_available():
            return library.WHY_MISSING
        if device.type != "cpu":
            return "it computes on CPUs only"
    elif not HAS_TRITON:
        return NO_TRITON
    elif device.type == "cpu" and not INTERPRETED:
        return (
            "its kernels run on GPUs, and on CPUs only with TRITON_INTERPRET=1 in the environment"
        )
    elif device.type not in ("cpu", "cuda"):
        return "it computes on NVIDIA and AMD GPUs only"
    elif device.type == "cuda" and (reason := _why_not_launched(device.index)):
        return reason
    return "" if dtype in DTYPES else f"it reads no features of {dtype}"


_launched: dict[int | None, str] = {}


def _why_not_launched(index: int | None) -> str:
    """Why Triton cannot compile for this GPU of CUDA, or on this machine; asked once for each."""
    if index not in _launched:
        if not torch.cuda.is_available():
            return ""
        _launched[index] = ""
        if torch.version.hip is None and torch.cuda.get_device_capability(index) < LEAST_CAPABILITY:
            have, least = torch.cuda.get_device_capability(index), LEAST_CAPABILITY
            _launched[index] = (
                f"Triton needs a GPU of compute capability {least[0]}.{least[1]} or more, "
                f"this one has {have[0]}.{have[1]}"
            )
        elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            _launched[index] = NO_COMPILER
    return _launched[index]


_warned: set[str] = set()


def _warn_once(name: str, kind: str, reason: str) -> None:
    """Say that torch operators stand in for backend `name` on devices of this kind.

    Not where they were chosen, nor where there is nothing to install.
    """
    if name in _warned:
        return
    remedy = INSTALL.get(reason, "")
    if name == "native":
        if library.IS_TURNED_OFF or not library.IS_BUILT_HERE:
            return
        remedy = library.REMEDY
    if not remedy:
        return
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
# warning, or a question about the machine, cannot be part of; the function itself would import the
# whole compiler here.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_launched._dynamo_marked_constant = True  # type: ignore[attr-defined]
