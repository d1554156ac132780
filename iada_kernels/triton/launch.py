"""Starting kernels, and writing down what is or would be started.

Every launcher of this package goes through `launch`. Inside `recording` each launch is written
down: with execute=False nothing runs, so that launchers can be called with meta or fake tensors to
learn shapes, to count launches and to compile, offline, exactly what ships.
"""

import contextlib
import contextvars
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.config import Configuration, SingleLaunchLimits, Tile, configuration_for


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its grid, its arguments by name, constants among them, and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    tile: Tile | SingleLaunchLimits | None = None

    def __call__(self) -> Any:
        """The same launch on what its arguments hold by now; the compiled kernel."""
        return self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """As Triton takes them."""
        return _options(self.num_warps, self.num_stages)

    def leaves(self) -> dict[str, Any]:
        """The arguments with records taken apart: {"sizes.N": 7, "weight": ..., "ACC": ...}."""
        return dict(_leaves("", self.arguments))


def _options(warps: int, stages: int) -> dict[str, Any]:
    # Triton's default for a·b + c in one rounding is about to change: fused is what was checked.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _leaves(prefix: str, arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            yield from _leaves(f"{prefix}{name}.", value._asdict())
        else:
            yield prefix + name, value


@dataclass
class _Recording:
    launches: list[Launch]
    execute: bool
    architecture: str | None


_recording: contextvars.ContextVar[_Recording | None] = contextvars.ContextVar(
    "recording", default=None
)

INTERPRETED = triton.knobs.runtime.interpret


@contextlib.contextmanager
def recording(execute: bool = True, architecture: str | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside; `architecture` ("sm_90") chooses its configuration."""
    current = _Recording([], execute, architecture)
    token = _recording.set(current)
    try:
        yield current.launches
    finally:
        _recording.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    like: Tensor,
    tile: Tile | SingleLaunchLimits | None = None,
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants); a grid with an empty axis is no launch.

    `tile` gives warps and stages, without one 4 and 2; `like` gives the device and the compute
    dtype, from which the constants ACC and DOT follow, for kernels that have them.
    """
    if 0 in grid:
        return
    if "ACC" in kernel.arg_names:
        constants["ACC"] = tl.float64 if like.dtype == torch.float64 else tl.float32
    if "DOT" in kernel.arg_names:
        constants["DOT"] = _dot_precision(current_configuration(like.device))
    warps, stages = (4, 2) if tile is None else (tile.warps, tile.stages)
    current = _recording.get()
    if current is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        current.launches.append(Launch(kernel, grid, named, warps, stages, tile))
        if not current.execute:
            return
    kernel[grid](*arguments, **constants, **_options(warps, stages))


def current_configuration(device: torch.device) -> Configuration:
    """The launch configuration for `device`, or for the architecture that is being recorded."""
    current = _recording.get()
    if current is not None and current.architecture is not None:
        return configuration_for(current.architecture)
    return configuration_for(_architecture(device))


@functools.cache  # asked several times a launch, and each time CUDA would be
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _dot_precision(configuration: Configuration) -> str:
    """How float32 is multiplied: true float32 unless torch was told that less will do."""
    if torch.get_float32_matmul_precision() == "highest":
        return configuration.true_float32
    return configuration.fast_float32


class Number(NamedTuple):
    """A double as two floats, because a kernel takes a Python number as float32."""

    high: float
    low: float


def split(number: float) -> Number:
    """`number` as a kernel takes it; `device.number` puts it together again."""
    high = ctypes.c_float(number).value
    return Number(high, number - high)
