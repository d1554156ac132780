"""Which backend serves a call.

`None` takes the best one for the device; a name insists, and fails loudly if it cannot serve.
"""

import importlib.util
import os

import torch

from iada_kernels import closed_form, native
from iada_kernels.contract import Backend
from iada_kernels.native.library import WHY_MISSING

BACKENDS = ("torch", "native", "triton")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def select_backend(
    name: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> Backend:
    """The module that computes on `device` for features of `dtype`.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot serve.
    """
    if name is None:
        if device.type == "cuda" and not _why_not_triton(device, dtype):
            return triton_backend()
        return closed_form if _why_not_native(device, dtype) else native
    if name == "torch":
        return closed_form
    if name not in BACKENDS:
        raise ValueError(
            f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}; "
            "pass one of these"
        )
    if name == "native":
        reason = _why_not_native(device, dtype)
        if not reason:
            return native
    else:
        reason = _why_not_triton(device, dtype)
        if not reason:
            return triton_backend()
    raise RuntimeError(
        f"backend: {name!r} cannot serve tensors on {device}: {reason}; "
        "use backend=None or backend='torch'"
    )


def triton_backend() -> Backend:
    """Imported when it is first needed: importing triton takes a while, and CPUs do without."""
    from iada_kernels import triton

    return triton


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu" and not INTERPRETED:
        return (
            "its kernels run on GPUs, and on CPUs only with TRITON_INTERPRET=1 in the environment"
        )
    if device.type not in ("cpu", "cuda"):
        return "it computes on NVIDIA and AMD GPUs only"
    if dtype not in DTYPES:
        return f"it reads no features of {dtype}"
    return ""


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str:
    if not native.is_available():
        return WHY_MISSING
    if device.type != "cpu":
        return "it computes on CPUs only"
    if dtype not in DTYPES:
        return f"it reads no features of {dtype}"
    return ""
