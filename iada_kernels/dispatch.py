"""Which backend serves a call.

`None` takes the best one for the device; a name insists, and fails loudly if it cannot serve.
"""

import torch

from iada_kernels import closed_form
from iada_kernels.contract import Backend

BACKENDS = ("torch", "native", "triton")


def select_backend(name: str | None, device: torch.device) -> Backend:
    """The module that computes on `device`.

    Raises ValueError for an unknown name and RuntimeError for a backend that this build lacks.
    """
    if name is None or name == "torch":
        return closed_form
    if name not in BACKENDS:
        raise ValueError(
            f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}; "
            "pass one of these"
        )
    raise RuntimeError(
        f"backend: {name!r} is not part of this build, so that it cannot serve tensors on "
        f"{device}; use backend=None or backend='torch'"
    )
