"""Replays: an operation without its Python, for calls alike in signature and numbers.

What an operation does with its tensors follows from both (`plans`): what it allocates, torch's
operators between the launches, and the launches. A `Trace` writes that down while a call follows
its plan, and a `Replay` does the same with other tensors. What kernels alone see, scratch, is one
allocation, whose parts they get as addresses; larger parts keep an allocation of their own.

A tensor is known by where it came from: given, allocated (launches then write it) or a result of an
operator. A trace that meets one of unknown origin, a launch that is not planned, an operator that
returns anything but one tensor, or an update of memory that two of the given tensors share has
failed, and such calls keep following their plan.
"""

import dataclasses
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PART_ALIGNMENT = 256  # bytes, at least that of an allocation of torch
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


class Instruction(NamedTuple):
    """A part of a replay, whose result becomes the next of its values."""

    function: Callable[..., Any] | None  # None: the arguments are the result, a record
    arguments: Pick
    is_launch: bool = False
    drops: tuple[int, ...] = ()  # values that nothing needs from here on


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What an operation does, on other tensors."""

    instructions: tuple[Instruction, ...]
    constants: tuple[Any, ...]
    offsets: tuple[int, ...]  # of the parts of the scratch
    scratch: Callable[[], Tensor] | None  # allocates it
    updated: Pick  # the tensors given that change
    result: int  # where it is among the values

    def __call__(self, tensors: Sequence[Tensor], stream: Any) -> Any:
        values: Values = [*tensors]
        if self.scratch is not None:
            scratch = self.scratch()  # lives until the last launch has been queued
            start = scratch.data_ptr()
            values += [start + offset for offset in self.offsets]
        values += self.constants
        for function, arguments, is_launch, drops in self.instructions:
            if function is None:
                values.append(arguments(values))
            elif is_launch:
                values.append(function(*arguments(values), stream=stream))
            else:
                values.append(function(*arguments(values)))
            for index in drops:
                values[index] = None
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
    """What a call does with `tensors`, which are `traceable`, as `with` surrounds it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._noted: list[_Noted] = []
        self._newest: Tensor | None = None  # result
        self._failed = False
        self._versions = [tensor._version for tensor in tensors]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import it, a second or more in the middle of training

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func is torch.ops.aten.detach.default and args[0] is self._newest:
            return args[0]  # torch.empty detaches what it allocates if somebody else knows of it
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
        pairs = enumerate(zip(self._tensors, self._versions, strict=True))
        changed = [index for index, (tensor, version) in pairs if tensor._version != version]
        # Tensors of the same memory have the same version: which of them was it?
        if self._failed or (changed and _share_memory(self._tensors)):
            return None
        try:
            return _Writer(self._tensors, self._noted).write(result, changed)
        except UnknownOrigin:
            return None


def traceable(tensors: Sequence[Tensor]) -> bool:
    """Whether they can be told apart, and what changes them can be seen."""
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.nbytes]
    return len(set(storages)) < len(storages)


class _Writer:
    """Makes a replay of what was noted."""

    def __init__(self, tensors: Sequence[Tensor], noted: list[_Noted]) -> None:
        self._tensors = tensors
        self._noted = noted
        self._known = {id(tensor): index for index, tensor in enumerate(tensors)}
        self._constants: list[Any] = []
        self._constant_at: dict[int, int] = {}
        self._records: dict[tuple[Any, ...], int] = {}
        self._instructions: list[Instruction] = []
        self._used: list[Sequence[int]] = []  # by each instruction
        self._large: list[int] = []  # tensors to be dropped when they have been used
        self._first_constant = self._first_result = 0

    def write(self, result: Any, changed: list[int]) -> Replay:
        scratch = self._scratch_of(result)
        offsets: list[int] = []
        size = 0
        for tensor in scratch:
            self._known[id(tensor)] = len(self._tensors) + len(offsets)
            offsets.append(size)
            size += -(-tensor.nbytes // PART_ALIGNMENT) * PART_ALIGNMENT
        self._first_constant = len(self._tensors) + len(offsets)
        self._collect(result)
        self._first_result = self._first_constant + len(self._constants)
        for noted in self._noted:
            self._translate(noted)
        at = self._returned(result)
        self._drop_after_use(at)
        allocate = _allocation((size,), torch.uint8, scratch[0].device) if scratch else None
        return Replay(
            tuple(self._instructions), tuple(self._constants), tuple(offsets), allocate,
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

    def _translate(self, noted: _Noted) -> None:
        tensor = noted.result
        if tensor is None:
            arguments = [self._at(value) for value in noted.arguments]
            self._append(noted.function, arguments, is_launch=True)
        elif noted.function not in _ALLOCATIONS:
            self._known[id(tensor)] = self._operator(noted, tensor)
        elif id(tensor) not in self._known:  # as parts of the scratch are
            allocate = _allocation(tuple(tensor.shape), tensor.dtype, tensor.device)
            if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
                allocate = _strided(tensor)
            self._known[id(tensor)] = self._append(allocate, [])
            if tensor.nbytes > LARGEST_PART:
                self._large.append(self._known[id(tensor)])

    def _operator(self, noted: _Noted, tensor: Tensor) -> int:
        if _tensors_in(list(noted.options.values())):
            raise UnknownOrigin
        function = _BINDINGS.get(noted.function, noted.function)
        if noted.options:
            function = _with_options(function, noted.options)
        at = self._append(function, [self._at(value) for value in noted.arguments])
        if tensor.nbytes > LARGEST_PART:
            self._large.append(at)
        return at

    def _append(
        self, function: Callable[..., Any] | None, used: Sequence[int], is_launch: bool = False
    ) -> int:
        self._instructions.append(Instruction(function, _pick(used), is_launch))
        self._used.append(used)
        return self._first_result + len(self._instructions) - 1

    def _drop_after_use(self, result: int) -> None:
        """Large tensors, and records that hold them, when the last who takes them is done."""
        drops: dict[int, list[int]] = {}
        for large in self._large:
            holders, last = {large}, large - self._first_result
            for place, used in enumerate(self._used):
                if not holders.isdisjoint(used):
                    last = place
                    function = self._instructions[place].function
                    if function is None or isinstance(function, type):  # a record
                        holders.add(self._first_result + place)
            if result not in holders:
                drops.setdefault(last, []).extend(holders)
        for place, indices in drops.items():
            instruction = self._instructions[place]
            self._instructions[place] = instruction._replace(drops=tuple(sorted(set(indices))))

    def _at(self, value: Any) -> int:
        """Where a value will be; a record with tensors is put together on the way."""
        if isinstance(value, Tensor):
            if id(value) not in self._known:
                raise UnknownOrigin
            return self._known[id(value)]
        if id(value) in self._constant_at:
            return self._constant_at[id(value)]
        if not isinstance(value, tuple):
            raise UnknownOrigin
        parts = tuple(self._at(part) for part in value)
        if parts not in self._records:
            self._records[parts] = self._append(None, parts)
        return self._records[parts]

    def _returned(self, value: Any) -> int:
        """As `_at`, with records of their own kinds; one that can be changed is made anew."""
        is_constant = isinstance(value, _IMMUTABLE) and id(value) in self._constant_at
        if isinstance(value, Tensor) or is_constant:
            return self._at(value)
        parts = [self._returned(part) for part in _parts(value)]
        return self._append(None if type(value) is tuple else type(value), parts)


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
