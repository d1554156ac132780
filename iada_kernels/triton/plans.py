"""Plans: the compiled kernels of an operation, kept for all calls that are alike.

Triton specialises every argument anew at each launch: a pointer by dtype and alignment, an integer
by whether it is 1 or a multiple of 16. Within an operation all of that follows from what comes from
outside, its signature: of each tensor dtype, shape, strides, alignment and device; which are
absent; the other arguments; and the state that launchers read. So the first call with a signature
goes Triton's way and notes the kernels in order, and later calls launch those.

A signature holds a float by its type alone: kernels take floats as they are, and no launcher
branches on one. Where floats too are those of the call before, what launchers do in Python is left
out as well: see `replay`. What is allocated inside an operation is aligned, because allocators of
torch align by 64 bytes or more. Profilers see planned launches: where one has given Triton hooks,
they are called. Where either is suspected of a fault, IADA_TRITON_PLANS=none in the environment, or
`allowing("none")`, does without.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel

from iada_kernels.contract import ClassStatistics, LossNeeds
from iada_kernels.precision import allows_tf32
from iada_kernels.triton import config
from iada_kernels.triton.replay import Replay, Trace

R = TypeVar("R")
Signature = tuple[Any, ...]
Numbers = tuple[float | str, ...]  # 0.0 and −0.0 as str, because they are equal

ALIGNMENT = 16  # bytes, by which Triton specialises pointers
_IS_HIP = torch.version.hip is not None
_HIP_OFFSET = 2**31 - 1  # AMD's buffer instructions reach this far into a storage
REPLAYS = 8  # of a plan at most
_writing = threading.Lock()
_BY_VALUE = frozenset({bool, int, str, type(None), LossNeeds})
_OWN: set[type] = set()


def own(record: type[R]) -> type[R]:
    """A record of tensors that an operation made for another, as its inputs and options have it.

    Those tell what is in it, but for what is absent: a signature leaves out the rest.
    """
    _OWN.add(record)
    return record


@dataclass
class Allowed:
    """What calls that repeat may use, of the process: backward passes have autograd's threads."""

    level: str = "replays"
    plans: bool = True
    replays: bool = True

    def set(self, level: str) -> None:
        """One of `LEVELS`: "none" is Triton's way each time."""
        if level not in LEVELS:
            names = ", ".join(map(repr, LEVELS))
            raise ValueError(f"{ALLOWED_BY}: expected one of {names}, got {level!r}; set one")
        self.level, self.plans, self.replays = level, level != "none", level == "replays"


LEVELS = ("replays", "plans", "none")
ALLOWED_BY = "IADA_TRITON_PLANS"
ALLOWED = Allowed()
ALLOWED.set(os.environ.get(ALLOWED_BY) or "replays")


@contextlib.contextmanager
def allowing(level: str) -> Iterator[None]:
    """Inside, calls use "replays", "plans" alone, or "none" of both."""
    former = ALLOWED.level
    ALLOWED.set(level)
    try:
        yield
    finally:
        ALLOWED.set(former)


class Unplannable(Exception):
    """A signature cannot tell an argument: a tensor of a subclass, for one."""


class Step(NamedTuple):
    """A launch of a plan."""

    kernel: Any  # as written
    grid: tuple[int, ...]
    start: Callable[..., None]  # the compiled kernel on this grid
    constants: tuple[Any, ...]  # they follow the arguments


class Described(NamedTuple):
    """The arguments of a call."""

    signature: Signature
    tensors: list[Tensor]
    numbers: Numbers


@dataclass(slots=True)
class Plan:
    """The launches of an operation in order, and its replays for numbers that came repeatedly."""

    steps: tuple[Step, ...]
    chosen: config.Configuration | None  # kept alive, because the signature has its address
    numbers: Numbers | None = None  # of the last call that was no replay
    replays: dict[Numbers, Replay | None] = field(default_factory=dict)  # None: not to be replayed

    def note(self, numbers: Numbers) -> bool:
        """Of a call that is no replay: whether they came twice in a row and were never traced."""
        repeated, self.numbers = numbers == self.numbers, numbers
        return repeated and numbers not in self.replays

    def keep(self, numbers: Numbers, replay: Replay | None) -> None:
        """For later calls with these numbers; the oldest of several goes."""
        with _writing:
            while len(self.replays) >= REPLAYS:
                del self.replays[next(iter(self.replays))]
            self.replays[numbers] = replay


class Plans:
    """Those of one operation by signature, at most `limit`: the oldest go first."""

    def __init__(self, limit: int = 512) -> None:
        self._known: dict[Signature, Plan] = {}
        self._limit = limit

    def __len__(self) -> int:
        return len(self._known)

    def find(self, signature: Signature) -> Plan | None:
        return self._known.get(signature)

    def keep(self, signature: Signature, plan: Plan) -> None:
        with _writing:
            while len(self._known) >= self._limit:
                del self._known[next(iter(self._known))]
            self._known[signature] = plan


class Call:
    """A call of an operation under way: it follows a plan, or notes its steps.

    A launch that is not the plan's next goes Triton's way, and is in no trace.
    """

    __slots__ = ("_remaining", "configuration", "noted", "stream", "trace")

    def __init__(self, plan: Plan | None, stream: Any, trace: Trace | None = None) -> None:
        self._remaining = iter(() if plan is None else plan.steps)
        self.noted: list[Step] | None = [] if plan is None else None
        self.stream = stream
        self.trace = trace
        self.configuration: config.Configuration | None = None  # once a launcher has asked

    def step(self, kernel: Any, grid: tuple[int, ...]) -> Step | None:
        """The next one, if it is of this kernel on this grid."""
        step = next(self._remaining, None)
        if step is None or step.kernel is not kernel or step.grid != grid:
            if self.trace is not None:
                self.trace.fail()
            return None
        return step

    def start(self, step: Step, arguments: tuple[Any, ...]) -> None:
        """Launch it."""
        arguments += step.constants
        step.start(*arguments, stream=self.stream)
        if self.trace is not None:
            self.trace.launch(step.start, arguments)

    def note(
        self, kernel: Any, grid: tuple[int, ...], compiled: Any, constants: tuple[Any, ...]
    ) -> None:
        """Add a step; without a compiled kernel there will be no plan."""
        if self.noted is None:
            return
        if isinstance(compiled, CompiledKernel):
            self.noted.append(Step(kernel, grid, starter(compiled, grid), constants))
        else:
            self.noted = None


def starter(compiled: CompiledKernel, grid: tuple[int, ...]) -> Callable[..., None]:
    """compiled[grid], which describes each launch to profilers, for when nobody listens."""
    x, y, z = grid + (1,) * (3 - len(grid))
    described = compiled[x, y, z]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def start(*arguments: Any, stream: Any) -> None:
        runtime = triton.knobs.runtime
        if _has_calls(runtime.launch_enter_hook) or _has_calls(runtime.launch_exit_hook):
            described(*arguments, stream=stream)
        else:
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return start


def _has_calls(hooks: Any) -> bool:
    return hooks is not None and getattr(hooks, "calls", True)


def describe(device: Any, arguments: Iterable[Any]) -> Described:
    """All that the kernels of an operation depend on; `device` is the current one."""
    parts = [
        device,
        id(config.chosen()),
        allows_tf32(),
        triton.knobs.runtime.debug,
        triton.knobs.compilation.instrumentation_mode,
    ]
    tensors: list[Tensor] = []
    numbers: list[float | str] = []
    _describe(arguments, parts, tensors, numbers)
    if tensors:
        parts.append(tensors[0].get_device())  # callers have checked that it is that of all
    return Described(tuple(parts), tensors, tuple(numbers))


def _describe(
    arguments: Iterable[Any], parts: list[Any], tensors: list[Tensor], numbers: list[float | str]
) -> None:
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            tensors.append(value)
            parts += value.dtype, value.shape, value.stride(), value.data_ptr() % ALIGNMENT
            if _IS_HIP:
                parts.append(value.untyped_storage().size() <= _HIP_OFFSET)
        elif kind in _BY_VALUE:
            parts.append(value)
        elif kind is float:
            parts.append(float)
            numbers.append(value or str(value))
        elif kind in _OWN:
            parts.append(kind)
            _describe_own(value, parts, tensors, numbers)
        elif isinstance(value, tuple):
            parts.append(kind)
            _describe(value, parts, tensors, numbers)
        elif kind is ClassStatistics:
            parts.append(kind)
            _describe((value.mean, value.count), parts, tensors, numbers)
        else:
            raise Unplannable(f"signature: {kind} is nothing that it tells")


def _describe_own(
    record: tuple[Any, ...], parts: list[Any], tensors: list[Tensor], numbers: list[float | str]
) -> None:
    for value in record:
        if type(value) is Tensor:
            parts.append(True)
            tensors.append(value)
        elif isinstance(value, tuple):
            parts.append(type(value))
            _describe_own(value, parts, tensors, numbers)
        else:
            _describe((value,), parts, tensors, numbers)
