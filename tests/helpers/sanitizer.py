"""Races, bounds and fresh memory of interpreted Triton kernels, watched access by access.

Inside `watching()` every launch is checked as its programs run:

    bounds       an access lies within a tensor that the kernel was given
    fresh        nothing is read of `torch.empty` memory before a kernel has written it
    programs     no program reads or writes what another one of the launch writes, unless both
                 have made an atomic access to one address, with acquire and release: the other
                 one after the store and a barrier, this one later; and it reads past the
                 first-level cache
    threads      what a program stored it reads again, or stores again, only after a
                 `tl.debug_barrier`, and no store writes one address twice
    overwrites   what a program read it stores only after a barrier

The interpreter runs one program after the other in one thread, and never shows a race by itself.
`order` may be "grid", "random", or "interleaved": programs take turns at each access.
"""

import contextlib
import inspect
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter

from tests.helpers.poison import poison_fresh_memory

BUILDER = interpreter.interpreter_builder
NOBODY, SEVERAL = -1, -2


class UnsafeAccess(AssertionError):
    """A rule of this module was broken."""


class _Abandoned(Exception):
    """Another program of the launch has failed."""


class Region:
    """The memory of one tensor, and who touched each element since the launch began."""

    def __init__(self, name: str, tensor: Tensor, written: np.ndarray | None) -> None:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = 1 + sum((count - 1) * stride for count, stride in steps)
        self.name, self.start, self.itemsize = name, tensor.data_ptr(), tensor.element_size()
        self.written = written  # of fresh memory, since it was allocated
        if written is not None:
            self.written = written[tensor.storage_offset() :][:size]
        self.writer, self.reader = np.full(size, NOBODY), np.full(size, NOBODY)
        self.write_time, self.read_time = (
            np.zeros(size, int),
            np.zeros(size, int),
        )  # barriers passed

    @property
    def touched_bytes(self) -> int:
        """Read and written, each element once for either."""
        elements = (self.writer != NOBODY).sum() + (self.reader != NOBODY).sum()
        return int(elements) * self.itemsize


@dataclass
class Sanitizer:
    """The state of one `watching`."""

    order: str = "grid"
    seed: int = 0
    # Accesses that are known to be safe, by kernel, rule and tensor.
    excused: frozenset[tuple[str, str, str]] = frozenset()
    void_barrier: tuple[str, int] | None = None  # function and line of one that does nothing
    fresh: dict[int, tuple[Tensor, np.ndarray]] = field(default_factory=dict)
    barriers: set[tuple[str, int]] = field(default_factory=set)
    kernels: set[str] = field(default_factory=set)
    # Of each launch, bytes that it read and that it wrote, each address once.
    moved: list[tuple[str, int]] = field(default_factory=list)

    def allocated(self, tensor: Tensor) -> None:
        """Fresh memory is kept, so that its address means the same to the end."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.fresh[tensor.untyped_storage().data_ptr()] = (tensor, np.zeros(size, bool))

    def launch(self, kernel: str, arguments: dict[str, Any], grid: tuple, body: Callable) -> None:
        """Run the programs of one launch."""
        self.kernel = kernel
        self.kernels.add(kernel)
        regions = {}
        for name, tensor in _tensors("", arguments):
            if tensor.numel():
                _, written = self.fresh.get(tensor.untyped_storage().data_ptr(), (None, None))
                region = Region(name, tensor, written)
                other = regions.setdefault(region.start, region)
                if len(other.writer) < len(region.writer):  # two views of one memory
                    regions[region.start] = region
        self.regions = [regions[start] for start in sorted(regions)]
        self.starts = np.array(sorted(regions), dtype=np.uint64)
        self.time: dict[int, int] = {}  # barriers that each program has passed
        # By address of atomic accesses, and by program: whose stores are seen, and of each those
        # before so many barriers.
        self.released: dict[int, dict[int, int]] = {}
        self.acquired: dict[int, dict[int, int]] = {}
        self.take_turns = None
        programs = list(enumerate(itertools.product(*map(range, grid))))
        if self.order != "grid":
            random.Random(self.seed).shuffle(programs)
        if self.order == "interleaved":
            _Turns(self, programs, body).run()
        else:
            for self.program, index in programs:
                BUILDER.set_grid_idx(*index)
                body()
        self.moved.append((kernel, sum(region.touched_bytes for region in self.regions)))

    def fail(self, rule: str, tensor: str, text: str) -> None:
        if (self.kernel, rule, tensor) not in self.excused:
            where = "{}:{}".format(*_caller())
            raise UnsafeAccess(f"{self.kernel} at {where}: {rule}: {tensor} {text}")

    def touched(self, pointers: Any, mask: Any) -> Iterator[tuple[Region, np.ndarray]]:
        """The elements under the mask, tensor by tensor."""
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        addresses = addresses.astype(np.uint64)
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        if (which < 0).any():
            self.fail("bounds", "memory", "before the first tensor is touched")
        for number in np.unique(which):
            region = self.regions[number]
            offsets = (addresses[which == number] - np.uint64(region.start)).astype(int)
            elements, size = offsets // region.itemsize, len(region.writer)
            if (elements >= size).any():
                self.fail("bounds", region.name, f"has {size} numbers, not {elements.max() + 1}")
            yield region, elements

    def sees(self, region: Region, at: np.ndarray, foreign: np.ndarray) -> bool:
        """Whether the stores of other programs to these elements come before what is done now."""
        seen = self.acquired.get(self.program, {})
        times = region.write_time[at][foreign]
        limits = [seen.get(int(writer), 0) for writer in region.writer[at][foreign]]
        return bool((times < limits).all())

    def load(self, pointers: Any, mask: Any, cache: Any) -> None:
        me, now = self.program, self.time.get(self.program, 0)
        for region, at in self.touched(pointers, mask):
            if region.written is not None and not region.written[at].all():
                self.fail("fresh", region.name, "is read before it is written")
            writer, reader = region.writer[at], region.reader[at]
            foreign = (writer != NOBODY) & (writer != me)
            if foreign.any():
                if not self.sees(region, at, foreign):
                    self.fail("programs", region.name, "is read, and stored by another program")
                if "CG" not in str(cache).upper():
                    self.fail("programs", region.name, "is read through the first-level cache")
            if ((writer == me) & (region.write_time[at] == now)).any():
                self.fail("threads", region.name, "is read after a store, without a barrier")
            region.reader[at] = np.where((reader == NOBODY) | (reader == me), me, SEVERAL)
            region.read_time[at] = now

    def store(self, pointers: Any, mask: Any) -> None:
        me, now = self.program, self.time.get(self.program, 0)
        for region, at in self.touched(pointers, mask):
            if len(np.unique(at)) < len(at):
                self.fail("threads", region.name, "is stored twice at once")
            writer, reader = region.writer[at], region.reader[at]
            foreign = (writer != NOBODY) & (writer != me)
            if not np.isin(reader, (NOBODY, me)).all() or not self.sees(region, at, foreign):
                self.fail("programs", region.name, "is stored, and used by another program")
            if ((writer == me) & (region.write_time[at] == now)).any():
                self.fail("threads", region.name, "is stored again without a barrier")
            if ((reader == me) & (region.read_time[at] == now)).any():
                self.fail("overwrites", region.name, "is stored after a load, without a barrier")
            region.writer[at], region.write_time[at] = me, now
            if region.written is not None:
                region.written[at] = True

    def atomic(self, pointers: Any, mask: Any, order: Any) -> None:
        mine = self.acquired.setdefault(self.program, {})
        for region, at in self.touched(pointers, mask):
            if "ACQUIRE_RELEASE" not in str(order):
                self.fail("programs", region.name, "is counted in without acquire and release")
            if region.written is not None and not region.written[at].all():
                self.fail("fresh", region.name, "is counted in before it is set")
            for element in at:
                address = region.start + int(element) * region.itemsize
                left = self.released.setdefault(address, {})
                mine |= {other: max(time, mine.get(other, 0)) for other, time in left.items()}
                left |= mine  # what this program has seen, who comes next sees too
                left[self.program] = self.time.get(self.program, 0)

    def barrier(self) -> None:
        site = _caller()
        self.barriers.add(site)
        if site != self.void_barrier:
            self.time[self.program] = self.time.get(self.program, 0) + 1


class _Turns:
    """Programs in threads of their own, of which one runs until its next access."""

    def __init__(self, state: Sanitizer, programs: list, body: Callable) -> None:
        self.state, self.body = state, body
        self.indices = dict(programs)
        self.draw = random.Random(state.seed)
        self.gates = {number: threading.Semaphore(0) for number in self.indices}
        self.alive = list(self.indices)
        self.done = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self) -> None:
        self.state.take_turns = self.turn
        threads = [threading.Thread(target=self.program, args=(n,)) for n in self.indices]
        for thread in threads:
            thread.start()
        self.next()
        self.done.acquire()
        for thread in threads:
            thread.join()
        self.state.take_turns = None
        if self.error is not None:
            raise self.error

    def program(self, number: int) -> None:
        self.gates[number].acquire()
        try:
            if self.error is None:
                self.body()
        except BaseException as error:
            self.error = self.error or error
        self.alive.remove(number)
        if self.alive:
            self.next()
        else:
            self.done.release()

    def next(self) -> int:
        number = self.draw.choice(self.alive)
        self.state.program = number
        BUILDER.set_grid_idx(*self.indices[number])
        self.gates[number].release()
        return number

    def turn(self) -> None:
        me = self.state.program
        self.next()
        self.gates[me].acquire()
        if self.error is not None:
            raise _Abandoned


def _tensors(prefix: str, arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, tuple) and hasattr(value, "_asdict"):
            yield from _tensors(f"{prefix}{name}.", value._asdict())


def _caller() -> tuple[str, int]:
    """Function and line of the kernel's code that is running."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(("triton.", __name__)):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_code.co_name, frame.f_lineno


@contextlib.contextmanager
def watching(**options: Any) -> Iterator[Sanitizer]:
    """Check every interpreted launch inside; options are fields of `Sanitizer`."""
    state = Sanitizer(**options)

    def watched(name: str, check: Callable, *places: int) -> None:
        access = getattr(BUILDER, name)

        def call(*arguments: Any) -> Any:
            if state.take_turns is not None:
                state.take_turns()
            check(*(arguments[place] for place in places))
            return access(*arguments)

        patch.setattr(BUILDER, name, call)

    def run_grid(self: Any, *given: Any, **named: Any) -> None:
        names = inspect.getfullargspec(self.fn)
        known = {k: v for k, v in named.items() if k in names.args + names.kwonlyargs}
        arguments = inspect.getcallargs(self.fn, *given, **known)
        values = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in arguments.items()
        }
        grid = (*self.grid, 1, 1)[:3]
        BUILDER.set_grid_dim(*grid)
        scope = interpreter._patch_lang(self.fn)
        try:
            state.launch(self.fn.__name__, arguments, grid, lambda: self.fn(**values))
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UnsafeAccess):
                cause = cause.__cause__
            raise cause or error from None
        finally:
            scope.restore()

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(BUILDER, "get_cache_policy"):  # newer Triton; older gives the modifier alone
            patch.setattr(BUILDER, "get_cache_policy", lambda modifier, eviction: modifier)
        watched("create_masked_load", state.load, 0, 1, 3)
        watched("create_masked_store", state.store, 0, 2)
        watched("create_atomic_rmw", state.atomic, 1, 3, 4)
        patch.setattr(BUILDER, "create_barrier", state.barrier)
        patch.setattr(interpreter.GridExecutor, "__call__", run_grid)
        poison_fresh_memory(patch, state.allocated)
        yield state
