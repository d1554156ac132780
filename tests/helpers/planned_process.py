"""A process that compares each planned launch with what Triton itself would launch there.

Nothing is compiled: in place of a binary stands its key, as Triton computes it from the arguments.
Each call is made as Triton makes it, inside `recording`, and then twice with plans; the launches
must be the same, and at each planned one Triton is asked for the binary. Without TRITON_INTERPRET:

    python -m tests.helpers.planned_process sm_90 --families 30

`--mutants` then leaves out one piece of the signature after the other, and names those without
which no call goes wrong.
"""

import argparse
import contextlib
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

from bench.combinations import Combination
from bench.offline import compiling_for
from iada_kernels.triton import launch, plans
from tests.helpers.planned_calls import Case, calls_of, families, in_force

PIECES = {  # of the source of `plans`, and what stands there instead
    **dict.fromkeys(("device,\n", "id(config.chosen()),", "value.dtype,"), "None,"),
    **dict.fromkeys(("allows_tf32(),", "triton.knobs.runtime.debug,"), "0,"),
    "triton.knobs.compilation.instrumentation_mode,": "0,",
    **dict.fromkeys(("value.shape,", "value.stride(),", "value.data_ptr() % ALIGNMENT,"), "0,"),
    **{
        f"parts.append(value)  # {kind}": f"parts.append(0 if kind is {kind} else value)"
        for kind in ("bool", "int", "str", "LossNeeds")
    },
}
HIP_PIECES = {"value.untyped_storage().size() <= _HIP_OFFSET": "0"}

_own = threading.local()  # of a thread: what has started, how many were planned, where to fail
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
        def start(*arguments: Any, stream: Any) -> None:
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
    _own.started, _own.planned, _own.fails_at = [], 0, fails_at
    call()
    return _own.started, _own.planned


def compare(case: Case) -> int:
    """The number of launches, of which each has been planned once."""
    total = 0
    with in_force(case):
        for call in calls_of(case):
            with launch.recording():
                expected, planned = started(call)
            assert planned == 0
            for _ in range(2):
                found, planned = started(call)
                if found != expected:
                    raise DifferenceError(f"{case}\nplanned {found}\nTriton's {expected}")
            if planned != len(expected):
                raise DifferenceError(f"{case}\n{planned} of {len(expected)} launches planned")
            total += planned
    return total


def compare_all(cases: list[Case], seed: int = 0) -> int:
    """In two random orders."""
    order = [*random.Random(seed).sample(cases, len(cases))]
    order += random.Random(seed + 1).sample(cases, len(cases))
    return sum(map(compare, order))


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
    """`plans.signature` that leaves out a piece; no signature of before is equal to one of it."""
    source = inspect.getsource(plans.signature) + inspect.getsource(plans._describe)
    pattern = piece.partition("  #")[0]
    assert pattern in source, f"{pattern} is no part of the signature"
    names = vars(plans) | {"LossNeeds": plans.LossNeeds}
    exec(source.replace(pattern, instead), names)
    return lambda *arguments: (piece, *names["signature"](*arguments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("--families", type=int, default=30)
    parser.add_argument("--mutants", action="store_true")
    options = parser.parse_args()
    assert not launch.INTERPRETED, "interpreted kernels have no keys"
    torch.set_num_threads(1)
    JITFunction._do_compile = _key_alone
    pieces = dict(PIECES)
    if options.architecture.startswith("gfx"):
        plans._IS_HIP = True
        pieces |= HIP_PIECES
    with compiling_for(options.architecture):
        cases = list(families(options.families))
        print(f"{compare_all(cases)} launches planned as Triton's")
        if not options.mutants:
            compare_in_threads(cases)
            compare_after_errors(cases[0].call)
            return 0
        missed = []
        for piece, instead in pieces.items():
            launch.signature = without(piece, instead)
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
