"""Which backend serves a call.

`None` takes the best one for the device; a name insists, and fails loudly if it cannot serve.
"""

import torch

from iada_kernels import closed_form, native
from iada_kernels.contract import Backend
from iada_kernels.native.library import WHY_MISSING

BACKENDS = ("torch", "native", "triton")

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def select_backend(
    name: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> Backend:
    """The module that computes on `device` for features of `dtype`.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot serve.
    """
    if name is None:
        return closed_form if _why_not_native(device, dtype) else native
    if name == "torch":
        return closed_form
    if name not in BACKENDS:
        raise ValueError(
            f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}; "
            "pass one of these"
        )
    reason = "it is not part of this build"
    if name == "native":
        reason = _why_not_native(device, dtype)
        if not reason:
            return native
    raise RuntimeError(
        f"backend: {name!r} cannot serve tensors on {device}: {reason}; "
        "use backend=None or backend='torch'"
    )


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str:
    if not native.is_available():
        return WHY_MISSING
    if device.type != "cpu":
        return "it computes on CPUs only"
    if dtype not in NATIVE_DTYPES:
        return f"it reads no features of {dtype}"
    return ""
