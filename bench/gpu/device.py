"""Measuring on a device: events, CUDA graphs, peak memory, and what the machine can do at best.

On a CPU the same functions serve with the host's clock, so that every path can be tried anywhere.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from iada_kernels.environment import environment

FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
COPY_BYTES, MATMUL_SIDE = 2**30, 8192


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a large copy, read and write counted; operations a second of a product."""

    bytes: float
    float32: float
    tf32: float

    def operations(self, precision: str | None) -> float:
        """The best rate of tl.dot with this `input_precision`; 3×TF32 is three products."""
        return {"tf32": self.tf32, "tf32x3": self.tf32 / 3}.get(precision or "", self.float32)


class Stopwatch:
    """Seconds of a call on the device, with its caches flushed before."""

    def __init__(self, device: torch.device, rounds: int = 60) -> None:
        self.device, self.rounds = device, rounds
        size = FLUSH_BYTES if device.type == "cuda" else 1
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object], host: bool) -> float:
        """With `host` the device is idle before, so that the time to launch counts as well.

        Without it the call is queued behind the flush, and what is measured is the device alone,
        provided that queueing the call takes no longer than the flush (about 100 µs).
        """
        self._flushed.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if host:
            torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def interleave(
        self, sides: Mapping[str, Callable[[], object]], host: bool, budget: float = 4.0
    ) -> dict[str, list[float]]:
        """Seconds of each side in each round: `rounds`, fewer but 5 as `budget` seconds allow."""
        least = min(5, self.rounds)
        for call in sides.values():
            for _ in range(min(3, self.rounds)):
                self.seconds(call, host)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        begin = time.monotonic()
        for done in range(self.rounds):
            if done >= least and time.monotonic() - begin > budget:
                break
            for name, call in sides.items():
                taken[name].append(self.seconds(call, host))
        return taken

    def median(self, call: Callable[[], object], budget: float = 1.0) -> float:
        return statistics.median(self.interleave({"": call}, False, budget)[""])


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A replay of `call` as one CUDA graph, and its results, which each replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most that `call` allocates on a GPU beyond what is there, its results among it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def measure_ceilings(watch: Stopwatch, small: bool) -> Ceilings:
    """What a copy and a matrix product reach on this machine now."""
    size, side = (2**16, 64) if small else (COPY_BYTES, MATMUL_SIDE)
    halves = torch.rand(2, size // 4, device=watch.device)
    copied = 2 * size / watch.median(lambda: halves[0].copy_(halves[1]))
    factors = torch.rand(2, side, side, device=watch.device)
    before, rates = torch.get_float32_matmul_precision(), {}
    try:
        for name in ("highest", "high"):
            torch.set_float32_matmul_precision(name)
            rates[name] = 2 * side**3 / watch.median(lambda: factors[0] @ factors[1])
    finally:
        torch.set_float32_matmul_precision(before)
    return Ceilings(copied, rates["highest"], rates["high"])


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    machine: dict[str, Any] = environment(device)
    if device.type != "cuda":
        return {"name": "cpu", **machine}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        **machine,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1e9


def release() -> None:
    """Hand freed memory back, so that one shape does not weigh on the next."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
