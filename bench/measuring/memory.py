"""Peak memory of a call, as the operating system saw it (Linux)."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that resident memory rose above its level at the start, while `call` ran.

    What `call` returns is alive until the end and so counts. Small allocations that the process
    had freed before may be used again unseen: measure in a fresh process, tensors of megabytes.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


def return_freed_memory() -> None:
    """From now on glibc's malloc gives each tensor of 64 KiB and more back when it is freed."""
    libc = ctypes.CDLL(None)
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(option, 2**16)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS}: expected a line {field}, got none; this needs Linux")
    return 1024 * int(found[1])
