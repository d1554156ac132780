"""Replays: an operation without its Python, for calls alike in signature and numbers.

What an operation does with its tensors follows from both (`plans`): what it allocates, torch's
operators between the launches, and the launches. A `Trace` writes that down while a call follows
its plan, and a `Replay` does the same with other tensors. What kernels alone see, scratch, is one
allocation, whose parts they get as addresses; larger parts keep an allocation of their own.

A tensor is known by where it came from: given, allocated or a result of an operator. A trace that
meets one of unknown origin, a launch that is not planned, or an operator that returns anything but
one tensor has failed, and such calls keep following their plan.
"""

import dataclasses
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALIGNMENT = 256  # bytes, at least that of an allocation of torch
LARGEST_PART = 2**20  # bytes: CUDA's allocator has a pool for what is not larger

Values = list[Any]  # of a replay, in order: tensors given, addresses, constants, results
Pick = Callable[[Values], tuple[Any, ...]]

_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
    }
)
_IMMUTABLE = (int, float, str, type(None), tuple)  # tuples of the same, where they hold no tensor

# torch's own bindings, which take half the time of a call of the operator.
_BINDINGS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.zeros.default: torch.zeros,
    torch.ops.aten.mul.Tensor: torch.mul,
    torch.ops.aten.mean.dim: torch.mean,
    torch.ops.aten.sum.dim_IntList: torch.sum,
    torch.ops.aten.view.default: Tensor.view,
}


class Step(NamedTuple):
    """One step of a replay, whose result becomes the next of its values."""

    function: Callable[..., Any] | None  # None: the arguments are the result, a record
    arguments: Pick
    is_launch: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What an operation does, on other tensors."""

    steps: tuple[Step, ...]
    constants: tuple[Any, ...]
    offsets: tuple[int, ...]  # of the parts of the scratch
    scratch: Callable[[], Tensor] | None  # allocates it
    updated: Pick  # the tensors given that change without an operator of torch
    result: int  # where it is among the values

    def __call__(self, tensors: Sequence[Tensor], stream: Any) -> Any:
        values: Values = [*tensors]
        if self.scratch is not None:
            scratch = self.scratch()  # lives until the last launch has been queued
            start = scratch.data_ptr()
            values += [start + offset for offset in self.offsets]
        values += self.constants
        for function, arguments, is_launch in self.steps:
            if function is None:
                values.append(arguments(values))
            elif is_launch:
                values.append(function(*arguments(values), stream=stream))
            else:
                values.append(function(*arguments(values)))
        updated = self.updated(values)
        if updated:
            torch.autograd.graph.increment_version(updated)
        return values[self.result]


class UnknownOrigin(Exception):
    """A tensor was not seen before."""


@dataclasses.dataclass
class _Noted:
    """A launch, or an operator and what it returned."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Tensor | None  # None for a launch


class Trace(TorchDispatchMode):
    """What a call does with `tensors`, as `with` surrounds it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._noted: list[_Noted] = []
        self._newest: Tensor | None = None  # result
        self._failed = len({id(tensor) for tensor in tensors}) < len(tensors)
        self._failed |= any(tensor.is_inference() for tensor in tensors)
        self._versions = [] if self._failed else [tensor._version for tensor in tensors]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func is torch.ops.aten.detach.default and args[0] is self._newest:
            return args[0]  # of torch.empty: it allocates, and detaches what it allocated
        if not isinstance(result, Tensor):
            self._failed = True
        self._noted.append(_Noted(func, args, options, result))
        self._newest = result
        return result

    def launch(self, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """`start` was called with them."""
        self._noted.append(_Noted(start, arguments, {}, None))

    def fail(self) -> None:
        """Something happened that cannot be replayed."""
        self._failed = True

    def replay(self, result: Any) -> Replay | None:
        """The call, which returned `result`; None if it cannot be replayed."""
        if self._failed:
            return None
        try:
            return _Writer(self._tensors, self._noted).write(result, self._versions)
        except UnknownOrigin:
            return None


class _Writer:
    """Makes a replay of what was noted."""

    def __init__(self, tensors: Sequence[Tensor], noted: list[_Noted]) -> None:
        self._tensors = tensors
        self._noted = noted
        self._known = {id(tensor): index for index, tensor in enumerate(tensors)}
        self._views: dict[tuple[Any, ...], int] = {}
        self._constants: list[Any] = []
        self._constant_at: dict[int, int] = {}
        self._records: dict[tuple[Any, ...], int] = {}
        self._steps: list[Step] = []
        self._first_constant = self._first_result = 0

    def write(self, result: Any, versions: list[int]) -> Replay:
        scratch = self._scratch_of(result)
        offsets: list[int] = []
        size = 0
        for tensor in scratch:
            self._known[id(tensor)] = len(self._tensors) + len(offsets)
            offsets.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._first_constant = len(self._tensors) + len(offsets)
        self._collect(result)
        self._first_result = self._first_constant + len(self._constants)
        for noted in self._noted:
            self._step(noted)
        at = self._returned(result)
        changed = [
            index
            for index, (tensor, version) in enumerate(zip(self._tensors, versions, strict=True))
            if tensor._version != version
        ]
        allocate = _allocation((size,), torch.uint8, scratch[0].device) if scratch else None
        return Replay(
            tuple(self._steps), tuple(self._constants), tuple(offsets), allocate,
            _pick(changed), at,
        )  # fmt: skip

    def _scratch_of(self, result: Any) -> list[Tensor]:
        """Allocations that launches alone have seen."""
        seen = {id(tensor) for tensor in _tensors_in(result)}
        for noted in self._noted:
            if noted.result is not None:
                seen |= {id(tensor) for tensor in _tensors_in(noted.arguments)}
        return [
            noted.result
            for noted in self._noted
            if noted.function in _ALLOCATIONS
            and noted.result is not None
            and id(noted.result) not in seen
            and 0 < noted.result.nbytes <= LARGEST_PART
        ]

    def _collect(self, result: Any) -> None:
        """Constants, which come before all results."""
        for noted in self._noted:
            if noted.function not in _ALLOCATIONS:
                for value in noted.arguments:
                    self._collect_from(value)
        self._collect_from(result)

    def _collect_from(self, value: Any) -> None:
        if isinstance(value, Tensor):
            return
        if not dataclasses.is_dataclass(value) and not _tensors_in(value):
            if id(value) not in self._constant_at:
                self._constant_at[id(value)] = self._first_constant + len(self._constants)
                self._constants.append(value)  # which keeps its identity taken
            return
        for each in _parts(value):
            self._collect_from(each)

    def _step(self, noted: _Noted) -> None:
        tensor = noted.result
        if tensor is None:
            arguments = [self._at(value) for value in noted.arguments]
            self._append(Step(noted.function, _pick(arguments), is_launch=True))
            return
        if noted.function in _ALLOCATIONS:
            if id(tensor) not in self._known:  # as a part of the scratch is
                allocate = _allocation(tuple(tensor.shape), tensor.dtype, tensor.device)
                if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
                    allocate = _strided(tensor)
                self._known[id(tensor)] = self._append(Step(allocate, _pick([])))
            return
        if _tensors_in(list(noted.options.values())):
            raise UnknownOrigin
        function = _BINDINGS.get(noted.function, noted.function)
        if noted.options:
            function = _with_options(function, noted.options)
        arguments = [self._at(value) for value in noted.arguments]
        at = self._append(Step(function, _pick(arguments)))
        self._known[id(tensor)] = at
        if tensor.nbytes:
            self._views[_memory(tensor)] = at

    def _append(self, step: Step) -> int:
        self._steps.append(step)
        return self._first_result + len(self._steps) - 1

    def _at(self, value: Any) -> int:
        """Where a value will be; a record with tensors is put together on the way."""
        if isinstance(value, Tensor):
            return self._origin(value)
        if id(value) in self._constant_at:
            return self._constant_at[id(value)]
        if not isinstance(value, tuple):
            raise UnknownOrigin
        parts = tuple(self._at(part) for part in value)
        if parts not in self._records:
            self._records[parts] = self._append(Step(None, _pick(parts)))
        return self._records[parts]

    def _returned(self, value: Any) -> int:
        """As `_at`, with records of their own kinds; one that can be changed is made anew."""
        is_constant = isinstance(value, _IMMUTABLE) and id(value) in self._constant_at
        if isinstance(value, Tensor) or is_constant:
            return self._at(value)
        parts = _pick([self._returned(part) for part in _parts(value)])
        is_plain = type(value) is tuple
        return self._append(Step(None if is_plain else type(value), parts))

    def _origin(self, tensor: Tensor) -> int:
        at = self._known.get(id(tensor))
        if at is None and tensor.nbytes:  # autograd returns a copy of a view's record
            at = self._views.get(_memory(tensor))
        if at is None:
            raise UnknownOrigin
        return at


def _parts(value: Any) -> Sequence[Any]:
    """Of a record: a tuple or a dataclass."""
    if isinstance(value, tuple):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    raise UnknownOrigin


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors_in(part)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _tensors_in(tuple(_parts(value)))
    return []


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _allocation(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    return lambda: torch.empty(size, dtype=dtype, device=device)


def _strided(tensor: Tensor) -> Callable[[], Tensor]:
    size, stride = tuple(tensor.shape), tensor.stride()
    dtype, device = tensor.dtype, tensor.device
    return lambda: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _with_options(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, **options)


def _pick(indices: Sequence[int]) -> Pick:
    """The values at `indices`, as a tuple."""
    if not indices:
        return lambda values: ()
    if len(indices) == 1:
        (index,) = indices
        return lambda values: (values[index],)
    return itemgetter(*indices)
