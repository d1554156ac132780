"""What figures belong to: versions, processor, and which backend serves. For tables and records."""

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

from iada_kernels.dispatch import HAS_TRITON, served_by
from iada_kernels.version import __version__


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """The versions, this machine, and what serves a call without `backend=` on `device`.

    Equal "processor", "capability", "torch" and "backend" give equal digits; others may not.
    """
    device = torch.device(device)
    found = {
        "iada": __version__,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "backend": served_by(None, device),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def headline(found: dict[str, str], contestants: dict[str, str]) -> str:
    """Two lines to print above a table: what it was measured with, and what each column is."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("iada", "torch", "python"))
    machine = found.get("device", f"{found['processor']}, {found['threads']} threads of torch")
    meanings = "; ".join(f"{name} = {meaning}" for name, meaning in contestants.items())
    return f"{versions}; {machine}\n{meanings}"


def source_commit() -> str:
    """The commit of the git checkout that this package runs from, "+" after it where files there
    differ; empty for an installed package, or without git."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def triton_version() -> str:
    """Whatever package brought it: builds of torch for AMD GPUs have one under another name."""
    if not HAS_TRITON:
        return "not installed"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get("triton", [])
        return f"{importlib.metadata.version(names[0])} ({names[0]})" if names else "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.machine()
