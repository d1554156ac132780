"""Starting kernels, and writing down what is or would be started.

Every launcher of this package goes through `launch`, and every operation is `planned`, so that what
Triton finds out at a launch it finds out once (`plans`). Inside `recording` each launch is written
down: with execute=False nothing runs, so that launchers can be called with meta or fake tensors to
learn shapes, to count launches and to compile, offline, exactly what ships. Nothing is planned
there, nor in the interpreter.
"""

import contextlib
import contextvars
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from iada_kernels.precision import allows_tf32
from iada_kernels.triton import config
from iada_kernels.triton.config import Configuration, SingleLaunchLimits, Tile, configuration_for
from iada_kernels.triton.plans import ALLOWED, Call, Plan, Plans, Unplannable, describe
from iada_kernels.triton.replay import Trace, traceable

P = ParamSpec("P")
R = TypeVar("R")

# NVIDIA's assembler holds registers back so that more programs fit on a multiprocessor, and at odd
# sizes keeps a few of a thread in memory for it. With this option of Triton a thread may have all.
ALL_REGISTERS = {"maxnreg": 255}


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

_tracing = threading.Lock()
_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)

INTERPRETED = triton.knobs.runtime.interpret
ON_CPU = -1  # what get_device calls it


@contextlib.contextmanager
def recording(execute: bool = True, architecture: str | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside; `architecture` ("sm_90") chooses its configuration."""
    current = _Recording([], execute, architecture)
    token, call = _recording.set(current), _call.set(None)
    try:
        yield current.launches
    finally:
        _call.reset(call)
        _recording.reset(token)


def planned(operation: Callable[P, R]) -> Callable[P, R]:
    """`operation`, whose launches are a function of its signature: see `plans`.

    It launches on the device of its first tensor.
    """
    plans = Plans()

    @functools.wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if INTERPRETED or _recording.get() is not None:
            return operation(*args, **kwargs)
        device = driver.active.get_current_device()
        where = _first_tensor(args).get_device()
        # Triton launches on the current device, wherever tensors are.
        if where not in (device, ON_CPU):
            with torch.cuda.device(where):
                return call(*args, **kwargs)
        if not ALLOWED.plans:
            return operation(*args, **kwargs)
        outer = _call.get()
        if outer is not None and outer.trace is not None:
            outer.trace.fail()  # launches of an operation within it are not its own
        try:
            described = describe(
                device, (*args, *itertools.chain(*kwargs.items())) if kwargs else args
            )
        except Unplannable:
            return _running(None, operation, *args, **kwargs)
        key, tensors, numbers = described
        plan, stream = plans.find(key), driver.active.get_current_stream(device)
        if plan is None:
            current = Call(None, stream)
            result = _running(current, operation, *args, **kwargs)
            if current.noted is not None:
                plans.keep(key, Plan(tuple(current.noted), config.chosen(), numbers))
            return result
        # Who watches operators sees the same each time.
        if not ALLOWED.replays or torch._C._len_torch_dispatch_stack():
            return _running(Call(plan, stream), operation, *args, **kwargs)
        replay = plan.replays.get(numbers)
        if replay is not None:
            return replay(tensors, stream)
        has_repeated = plan.note(numbers)
        # A mode of torch's keeps flags of the process: one thread traces, others follow their plan.
        if not (has_repeated and traceable(tensors) and _tracing.acquire(blocking=False)):
            return _running(Call(plan, stream), operation, *args, **kwargs)
        try:
            with Trace(tensors) as trace:
                result = _running(Call(plan, stream, trace), operation, *args, **kwargs)
            plan.keep(numbers, trace.replay(result))
            return result
        finally:
            _tracing.release()

    return call


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Of an operation's first argument, a tensor or a record that begins with one."""
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]


def _running(call: Call | None, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    token = _call.set(call)
    try:
        return operation(*args, **kwargs)
    finally:
        _call.reset(token)


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
    call = _call.get()
    if call is not None:
        step = call.step(kernel, grid)
        if step is not None:
            call.start(step, arguments)
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
    options = _options(warps, stages)
    compiled = kernel[grid](*arguments, **constants, **options)
    if call is not None and call.noted is not None:
        names = kernel.arg_names[len(arguments) :]
        again = functools.partial(
            kernel.warmup, *arguments, grid=grid, **constants, **options, **ALL_REGISTERS
        )
        compiled = keeping_less(compiled, again)
        call.note(kernel, grid, compiled, tuple(constants[name] for name in names))


def keeping_less(binary: Any, again: Callable[[], Any]) -> Any:
    """`binary`, or that of `again`, made with ALL_REGISTERS, if it keeps less in memory."""
    if not isinstance(binary, CompiledKernel) or not binary.n_spills:
        return binary
    if binary.metadata.target.backend != "cuda":
        return binary
    other = again()
    _ = other[(1, 1, 1)]  # loads it, which tells n_spills
    return other if other.n_spills < binary.n_spills else binary


def current_configuration(device: torch.device) -> Configuration:
    """The launch configuration for `device`, or for the architecture that is being recorded."""
    call = _call.get()
    if call is not None:  # within one operation it is one
        if call.configuration is None:
            call.configuration = configuration_for(_architecture(device))
        return call.configuration
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
    return configuration.fast_float32 if allows_tf32() else configuration.true_float32


class Number(NamedTuple):
    """A double as two floats, because a kernel takes a Python number as float32."""

    high: float
    low: float


def split(number: float) -> Number:
    """`number` as a kernel takes it; `device.number` puts it together again."""
    high = ctypes.c_float(number).value
    return Number(high, number - high)
