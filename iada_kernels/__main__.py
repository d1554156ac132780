"""`python -m iada_kernels`: which backends serve here, and what they run on."""

import sys

import torch

from iada_kernels import native
from iada_kernels.dispatch import BACKENDS, select_backend, why_not
from iada_kernels.environment import environment
from iada_kernels.native import library


def main() -> int:
    """Print the table; the exit code."""
    for name, value in environment().items():
        if name != "backend":
            print(f"{name:10} {value}")
    print()
    for name in BACKENDS:
        served = [kind for kind in ("cpu", "cuda") if _serves(name, torch.device(kind))]
        print(f"{name:10} {' and '.join(served) if served else 'not available'}{_detail(name)}")
    return 0


def _serves(name: str, device: torch.device) -> bool:
    try:
        select_backend(name, device)
    except RuntimeError:
        return False
    return device.type == "cpu" or torch.cuda.is_available()


def _detail(name: str) -> str:
    if name == "triton" and torch.cuda.is_available():
        why = why_not(name, torch.device("cuda"), torch.float32)
        return f": {why}; torch operators stand in" if why else ""
    if name != "native":
        return ""
    if native.is_available():
        return f", instruction set {native.instruction_set()}"
    return f": {library.WHY_MISSING}; torch operators stand in\n{'':10} {library.REMEDY}"


if __name__ == "__main__":
    sys.exit(main())
