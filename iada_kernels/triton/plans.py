"""Plans: the compiled kernels of an operation, kept for all calls that are alike.

Triton specialises every argument anew at each launch: a pointer by dtype and alignment, an integer
by whether it is 1 or a multiple of 16. Within an operation all of that follows from what comes from
outside, its signature: of each tensor dtype, shape, strides, alignment and device; which are
absent; the other arguments; and the state that launchers read. So the first call with a signature
goes Triton's way and notes the kernels in order, and later calls launch those.

A signature holds a float by its type alone: kernels take floats as they are, and no launcher
branches on one. What is allocated inside an operation is aligned, because allocators of torch align
by 64 bytes or more. Profilers see planned launches: Triton calls their launch hooks there too.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel

from iada_kernels.contract import ClassStatistics, LossNeeds
from iada_kernels.precision import allows_tf32
from iada_kernels.triton import config

Signature = tuple[Any, ...]

ALIGNMENT = 16  # bytes, by which Triton specialises pointers
_IS_HIP = torch.version.hip is not None
_HIP_OFFSET = 2**31 - 1  # AMD's buffer instructions reach this far into a storage
_BY_VALUE = frozenset({bool, int, str, type(None), LossNeeds})


class Unplannable(Exception):
    """A signature cannot tell an argument: a tensor of a subclass, for one."""


class Step(NamedTuple):
    """A launch of a plan."""

    kernel: Any  # as written
    grid: tuple[int, ...]
    start: Callable[..., None]  # the compiled kernel on this grid
    constants: tuple[Any, ...]  # they follow the arguments


class Plan(NamedTuple):
    """The launches of an operation in order."""

    steps: tuple[Step, ...]
    chosen: config.Configuration | None  # kept alive, because the signature has its address


class Plans:
    """Those of one operation by signature, at most `limit`: the oldest go first."""

    def __init__(self, limit: int = 512) -> None:
        self._known: dict[Signature, Plan] = {}
        self._limit = limit
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, signature: Signature) -> Plan | None:
        return self._known.get(signature)

    def keep(self, signature: Signature, plan: Plan) -> None:
        with self._writing:
            while len(self._known) >= self._limit:
                del self._known[next(iter(self._known))]
            self._known[signature] = plan


class Call:
    """A call of an operation under way: it follows a plan, or notes its steps.

    A launch that is not the plan's next goes Triton's way.
    """

    __slots__ = ("_remaining", "configuration", "noted", "stream")

    def __init__(self, plan: Plan | None, stream: Any) -> None:
        self._remaining = iter(() if plan is None else plan.steps)
        self.noted: list[Step] | None = [] if plan is None else None
        self.stream = stream
        self.configuration: config.Configuration | None = None  # once a launcher has asked

    def step(self, kernel: Any, grid: tuple[int, ...]) -> Step | None:
        """The next one, if it is of this kernel on this grid."""
        step = next(self._remaining, None)
        if step is None or step.kernel is not kernel or step.grid != grid:
            return None
        return step

    def note(
        self, kernel: Any, grid: tuple[int, ...], compiled: Any, constants: tuple[Any, ...]
    ) -> None:
        """Add a step; without a compiled kernel there will be no plan."""
        if self.noted is None:
            return
        if isinstance(compiled, CompiledKernel):
            start = compiled[grid + (1,) * (3 - len(grid))]
            self.noted.append(Step(kernel, grid, start, constants))
        else:
            self.noted = None


def signature(device: Any, arguments: Iterable[Any]) -> Signature:
    """All that the kernels of an operation depend on; `device` is the current one."""
    parts = [
        device,
        id(config.chosen()),
        allows_tf32(),
        triton.knobs.runtime.debug,
        triton.knobs.compilation.instrumentation_mode,
    ]
    _describe(arguments, parts)
    return tuple(parts)


def _describe(arguments: Iterable[Any], parts: list[Any]) -> None:
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            parts += (
                value.dtype, value.shape, value.stride(), value.data_ptr() % ALIGNMENT,
                value.get_device(),
            )  # fmt: skip
            if _IS_HIP:
                parts.append(value.untyped_storage().size() <= _HIP_OFFSET)
        elif kind in _BY_VALUE:
            parts.append(value)
        elif kind is float:
            parts.append(float)
        elif isinstance(value, tuple):
            parts.append(kind)
            _describe(value, parts)
        elif kind is ClassStatistics:
            parts.append(kind)
            _describe((value.mean, value.count), parts)
        else:
            raise Unplannable(f"signature: {kind} is nothing that it tells")
