"""One case, and many: which pass, under which circumstances, and what came of it."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType

import pytest
import torch

from tests.fuzz.draw import COMPILED, INTERPRETED, Draw
from tests.fuzz.front_door import fuzz_front_door
from tests.fuzz.judge import FACTOR, Judged, broken
from tests.fuzz.loss import fuzz_loss, fuzz_stream
from tests.fuzz.statistics import fuzz_characteristics, fuzz_covariance, fuzz_hypergradient
from tests.helpers.interpreter import cast_through_float32, patch_language_once
from tests.helpers.poison import poison_fresh_memory

Pass = Callable[[Draw, str, torch.device], list[Judged]]

# Of 23 cases: the loss alone, with its stream, with what the front doors add, the other passes.
PASSES: dict[str, tuple[int, Pass]] = {
    "loss": (10, fuzz_loss),
    "stream": (3, fuzz_stream),
    "front door": (3, fuzz_front_door),
    "covariance": (2, fuzz_covariance),
    "hypergradient": (3, fuzz_hypergradient),
    "characteristics": (2, fuzz_characteristics),
}


@dataclass
class Case:
    """One case and what was found."""

    seed: int
    number: int
    kind: str
    results: list[Judged]

    @property
    def worst(self) -> Judged:
        return max(self.results, key=lambda result: result.ratio)

    @property
    def failed(self) -> bool:
        return not self.worst.ratio <= FACTOR


@dataclass
class Tally:
    """What many cases came to."""

    cases: int = 0
    tensors: int = 0
    worse_than_torch: int = 0
    failed: list[Case] = field(default_factory=list)
    worst: dict[str, Case] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        self.cases += 1
        self.tensors += len(case.results)
        self.worse_than_torch += sum(r.error > r.torch_error for r in case.results)
        if case.failed:
            self.failed.append(case)
        former = self.worst.get(case.kind)
        if former is None or case.worst.ratio > former.worst.ratio:
            self.worst[case.kind] = case


def run_case(seed: int, number: int, backend: str, device: torch.device) -> Case:
    interpreted = backend == "triton" and device.type == "cpu"
    draw = Draw(seed, number, INTERPRETED if interpreted else COMPILED)
    names, weights = list(PASSES), [weight for weight, _ in PASSES.values()]
    (kind,) = draw.random.choices(names, weights)
    with circumstances(draw, backend, device):
        try:
            results = PASSES[kind][1](draw, backend, device)
        except Exception as error:  # whatever a pass raises for arguments that it permits
            results = [broken(f"raises {type(error).__name__}: {error}")]
    return Case(seed, number, kind, results)


@contextlib.contextmanager
def circumstances(draw: Draw, backend: str, device: torch.device) -> Iterator[None]:
    """Fresh memory is NaN; block sizes, threads and which kernels serve are drawn."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        blocks, few_rows = draw.choice((None, None, 1, 20, 300)), draw.choice((None, None, 0, 32))
        large_head, general = draw.chance(0.2), draw.chance(0.5)
        threads = 2 if draw.chance(0.05) else 1
        constants = {"BLOCK_ELEMENTS": blocks, "FEW_ROWS": few_rows}
        if large_head:  # the native backend hands large heads over to the closed forms
            constants["LARGE_HEAD"] = 0
        for name, value in constants.items():
            for module in _modules_with(name):
                if value is not None:
                    patch.setattr(module, name, value)
        if backend == "triton":
            poison_fresh_memory(patch)
            if device.type == "cpu":
                cast_through_float32(patch)
                patch_language_once(patch)
            if general:
                stack.enter_context(_without_the_single_launch(device))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        stack.callback(torch.use_deterministic_algorithms, False)
        if draw.chance(0.8):  # torch then fills what it allocates, in C++ too
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield


@functools.cache
def _modules_with(constant: str) -> list[ModuleType]:
    """Modules of the kernels that have this constant: others import it by name."""
    parts = ("iada_kernels.torch_ops", "iada_kernels.native")
    return [m for n, m in sys.modules.items() if n.startswith(parts) and hasattr(m, constant)]


def _without_the_single_launch(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """It would take most small problems."""
    from iada_kernels.triton import config
    from iada_kernels.triton.launch import current_configuration

    chosen = current_configuration(device)
    return config.use(replace(chosen, single_launch=replace(chosen.single_launch, classes=0)))
