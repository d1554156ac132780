"""A process that compares each planned launch with what Triton itself would launch there.

Nothing is compiled: in place of a binary stands its key, as Triton computes it from the arguments.
Each call is made as Triton makes it, inside `recording`, and then three times with plans, at least
once as a replay if it can be one; the launches must be the same, and at each planned one Triton is
asked for the binary. Without TRITON_INTERPRET:

    python -m tests.helpers.planned_process sm_90 --families 30

`--mutants` then leaves out one piece of the signature after the other, and names those without
which no call goes wrong.
"""

import argparse
import contextlib
import functools
import inspect
import random
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from bench.offline.combinations import Combination
from bench.offline.compiler import compiling_for
from iada_kernels.triton import launch, plans
from tests.helpers.planned_calls import Case, calls_of, families, in_force

PIECES = {  # of the source of `plans`, and what stands there instead
    **dict.fromkeys(("device,\n", "id(config.chosen()),", "value.dtype,"), "None,"),
    **dict.fromkeys(("allows_tf32(),", "triton.knobs.runtime.debug,"), "0,"),
    "triton.knobs.compilation.instrumentation_mode,": "0,",
    **dict.fromkeys(("value.shape,", "value.stride(),"), "0,"),
    "value.data_ptr() % ALIGNMENT": "0",
    **{
        f"parts.append(value)  # {kind}": f"parts.append(0 if kind is {kind} else value)"
        for kind in ("bool", "int", "str", "LossNeeds")
    },
}
HIP_PIECES = {"value.untyped_storage().size() <= _HIP_OFFSET": "0"}

_own = (
    threading.local()
)  # of a thread: what has started, how many of it planned, addresses, where to fail
_compiling = threading.Lock()


class DifferenceError(Exception):
    """A planned launch is not Triton's."""


class Key(CompiledKernel):
    """Stands where a binary does."""

    module = function = packed_metadata = None
    n_spills = 0

    def __init__(self, kernel: JITFunction, name: str, options: Any) -> None:
        self.kernel, self.name, self.options = kernel, name, options

    def launch_metadata(self, *arguments: Any) -> None:
        pass

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        """As Triton launches: stream, function, two sets of metadata and two hooks come first."""
        if len(_own.started) == _own.fails_at:
            raise FloatingPointError("launch: as asked for")
        _own.started.append(Started(self, (x, y, z), _told(rest[6:])))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        grid += (1,) * (3 - len(grid))
        example: list[Any] = []

        def start(*arguments: Any, stream: Any) -> None:
            if not example:  # the first time nothing is an address
                example.append(arguments)
            arguments = _with_tensors(arguments, example[0])
            names = ("num_warps", "num_stages", "enable_fp_fusion")
            options = {name: getattr(self.options, name) for name in names}
            found = self.kernel.run(*arguments, grid=grid, warmup=True, **options)
            if found is not self:
                raise DifferenceError(f"planned {self.name}\nTriton's {found.name}")
            _own.planned += 1
            _own.started.append(Started(self, grid, _told(arguments)))

        return start


class Started(NamedTuple):
    """A launch and its arguments, as they can be told apart by more than addresses."""

    binary: Key
    grid: tuple[int, ...]
    arguments: Any


def _with_tensors(value: Any, example: Any) -> Any:
    """The arguments of a replay, with the tensor of the example in place of an address."""
    if isinstance(example, tuple):
        return tuple(map(_with_tensors, value, example))
    if isinstance(example, Tensor) and not isinstance(value, Tensor):
        if value % plans.ALIGNMENT:
            raise DifferenceError(f"scratch at {value}, which is not aligned")
        _own.addresses += 1
        return example
    return value


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    if isinstance(value, tuple):
        return [_told(each) for each in value]
    return repr(value.value if isinstance(value, tl.constexpr) else value)


def _key_alone(
    self: Any, key: str, signature: Any, device: Any, constants: Any, options: Any, *_: Any
) -> Key:
    """In place of JITFunction._do_compile."""
    with _compiling:
        return self.device_caches[device][0].setdefault(key, Key(self, key, options))


def started(call: Callable[[], object], fails_at: int = -1) -> tuple[list[Started], int]:
    """The launches of a call, and how many of them were planned."""
    _own.started, _own.planned, _own.fails_at, _own.addresses = [], 0, fails_at, 0
    call()
    return _own.started, _own.planned


class Counts(NamedTuple):
    """Launches, of which each has been planned, and addresses that replays gave to them."""

    launches: int
    addresses: int

    def plus(self, other: "Counts") -> "Counts":
        return Counts(self.launches + other.launches, self.addresses + other.addresses)


def compare(case: Case) -> Counts:
    """What was compared."""
    total = Counts(0, 0)
    with in_force(case):
        for call in calls_of(case):
            with launch.recording():
                expected, planned = started(call)
            assert planned == 0
            for _ in range(3):
                found, planned = started(call)
                if found != expected:
                    raise DifferenceError(f"{case}\nplanned {found}\nTriton's {expected}")
            if planned != len(expected):
                raise DifferenceError(f"{case}\n{planned} of {len(expected)} launches planned")
            total = total.plus(Counts(planned, _own.addresses))
    return total


def compare_all(cases: list[Case], seed: int = 0) -> Counts:
    """In two random orders."""
    order = [*random.Random(seed).sample(cases, len(cases))]
    order += random.Random(seed + 1).sample(cases, len(cases))
    return functools.reduce(Counts.plus, map(compare, order))


def compare_in_threads(cases: list[Case], threads: int = 4) -> None:
    """At once; what is in force for all threads of a process has to be the same."""
    alike = [
        case for case in cases
        if case.call.matmul == "highest" and case.device == "first"
        and not case.debug and not case.instrumentation
    ]  # fmt: skip
    failed: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            compare_all(alike, seed)
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]


def compare_after_errors(call: Combination) -> None:
    """What an error leaves is no plan: the next call goes Triton's way, all of it."""
    call = replace(call, rows=33, classes=10, width=40, structure="full", terms=("epsilon",))
    case = Case(call, ignore_index=12345, configuration=2)  # for which there is no plan
    with in_force(case):
        loss = calls_of(case)[0]
        with launch.recording():
            expected, _ = started(loss)
        assert len(expected) > 3, "the call has too few launches"
        for fails_at in range(1, 3):
            with contextlib.suppress(FloatingPointError):
                started(loss, fails_at)
                raise DifferenceError("no error where one was asked for")
        found, planned = started(loss)
        if found != expected or planned:
            raise DifferenceError(f"after an error: {planned} launches planned of {len(expected)}")
    compare(case)


def without(piece: str, instead: str) -> Any:
    """`plans.describe` whose signature lacks a piece, and is equal to none of before."""
    source = "".join(map(inspect.getsource, (plans.describe, plans._describe)))
    pattern = piece.partition("  #")[0]
    assert pattern in source, f"{pattern} is no part of the signature"
    names = vars(plans) | {"LossNeeds": plans.LossNeeds}
    exec(source.replace(pattern, instead), names)

    def describe(*arguments: Any) -> plans.Described:
        described = names["describe"](*arguments)
        return described._replace(signature=(piece, *described.signature))

    return describe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("--families", type=int, default=30)
    parser.add_argument("--mutants", action="store_true")
    options = parser.parse_args()
    assert not launch.INTERPRETED, "interpreted kernels have no keys"
    torch.set_num_threads(1)
    JITFunction._do_compile = _key_alone
    plans.starter = Key.__getitem__
    pieces = dict(PIECES)
    if options.architecture.startswith("gfx"):
        plans._IS_HIP = True
        pieces |= HIP_PIECES
    with compiling_for(options.architecture):
        cases = list(families(options.families))
        counts = compare_all(cases)
        print(f"{counts.launches} launches planned as Triton's, {counts.addresses} addresses")
        if not options.mutants:
            compare_in_threads(cases)
            compare_after_errors(cases[0].call)
            return 0
        missed = []
        for piece, instead in pieces.items():
            launch.describe = without(piece, instead)
            try:
                compare_all(cases)
            except DifferenceError:
                print("seen:", re.sub(r"\s+", " ", piece))
            else:
                missed.append(piece)
                print("MISSED:", re.sub(r"\s+", " ", piece))
        return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
