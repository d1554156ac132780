"""`python -m iada_kernels`: which backends serve here, and what they run on."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from iada_kernels import native
from iada_kernels.dispatch import BACKENDS, select_backend
from iada_kernels.native import library


def main() -> int:
    """Print the table; the exit code."""
    for name in ("iada", "torch", "triton"):
        print(f"{name:8} {_version(name)}")
    print(f"{'python':8} {platform.python_version()} on {platform.machine()}")
    print(f"{'threads':8} {torch.get_num_threads()}")
    print()
    for name in BACKENDS:
        served = [kind for kind in ("cpu", "cuda") if _serves(name, torch.device(kind))]
        print(f"{name:8} {' and '.join(served) if served else 'not available'}{_detail(name)}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _serves(name: str, device: torch.device) -> bool:
    try:
        select_backend(name, device)
    except RuntimeError:
        return False
    return device.type == "cpu" or torch.cuda.is_available()


def _detail(name: str) -> str:
    if name != "native":
        return ""
    if native.is_available():
        return f", instruction set {native.instruction_set()}"
    return f": {library.WHY_MISSING}; torch operators stand in"


if __name__ == "__main__":
    sys.exit(main())
