"""`python -m bench.gpu`: the Triton kernels on this GPU: right, capturable, and how fast.

At every reference shape: value, gradients and update against float64, judged by torch's own error;
one step captured in a CUDA graph and replayed on new data; peak memory; then times, interleaved,
with cold caches, launch by launch (the host's share counts) and as replays of CUDA graphs (the
device alone); each kernel's share of what the machine's bandwidth and matrix products allow.
Writes one JSON; exit code 1 if anything is wrong. What the budget leaves no time for is named.

`--dry-run` takes the same path on a CPU with tiny shapes and interpreted kernels.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.accuracy import (
    State,
    exact,
    judged,
    loss_module,
    make_state,
    outcome,
    step,
    with_sure_signs,
)
from bench.contestants import (
    MEANING,
    Side,
    cross_entropy_side,
    eager_side,
    fused_side,
    loss_side,
    why_not_eager,
)
from bench.device import (
    Ceilings,
    Stopwatch,
    captured,
    describe,
    free_bytes,
    measure_ceilings,
    peak_bytes,
    release,
)
from bench.gpu_table import table
from bench.kernel_times import kernel_rows
from bench.shapes import SHAPES, Problem, Shape, make_problem
from bench.timing import ratio
from iada_kernels.dispatch import INTERPRETED
from iada_kernels.environment import headline, triton_version

# The shapes that the targets name come first.
ORDER = (
    "cifar100-r32",
    "imagenet-diag",
    "cifar100-wrn",
    "subpop-r50",
    "cifar10-r32",
    "civil-bert",
    "inat-diag",
    "dense",
)
TINY = {
    shape.name: shape
    for shape in (
        Shape("tiny-full", 12, 3, 8, "full"),
        Shape("tiny-diag", 12, 4, 8, "diag"),
        Shape("tiny-dense", 40, 3, 8, "full", "skewed"),
    )
}


class Run:
    """One run: what was found so far, and the time that is left for more."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device = device
        self.watch = Stopwatch(device) if device.type == "cuda" else Stopwatch(device, rounds=1)
        self.begin, self.budget = time.monotonic(), budget
        self.compiler = "inductor" if device.type == "cuda" else "eager"
        self.left_out: list[str] = []
        self.failures: list[str] = []
        self.shapes: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def attempt(self, what: str, seconds: float, call: Callable[[], Any]) -> Any:
        """call(), unless less than `seconds` are left; an error is a failure of the run."""
        if self.left < seconds:
            self.left_out.append(what)
            return None
        start = time.monotonic()
        try:
            found = call()
        except Exception as error:  # one shape or side must not take the others with it
            self.fail(f"{what}: {_brief(error)}")
            found = None
        print(
            f"[{self.budget - self.left:5.0f} s] {what}: {time.monotonic() - start:.1f} s",
            flush=True,
        )
        release()
        return found

    def fail(self, what: str) -> None:
        print(f"FAILED {what}", flush=True)
        self.failures.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=450, help="seconds in all (default 450)")
    parser.add_argument("--shapes", nargs="+", choices=ORDER, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    why = _refusal(options.dry_run)
    if why:
        print(f"bench.gpu: {why}", file=sys.stderr)
        return 2
    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.budget)
    shapes = TINY if options.dry_run else {name: SHAPES[name] for name in options.shapes or ORDER}
    ceilings = measure_ceilings(run.watch, small=options.dry_run)
    run.shapes = {name: {"shape": str(shape)} for name, shape in shapes.items()}
    for name, shape in shapes.items():
        check(run, name, shape)
    for name, shape in shapes.items():
        measure(run, name, shape, ceilings)
    for contestant in ("torch_compiled", "eager_compiled"):
        for name, shape in shapes.items():
            add_compiled(run, name, shape, contestant)
    path = options.out / _file_name(run.device)
    path.write_text(json.dumps(report(run, ceilings), indent=1) + "\n")
    contestants = f"{headline(describe(run.device), MEANING)}; triton {triton_version()}"
    print(f"\n{path}\n\n{contestants}\n\n{table(run.shapes, ceilings)}")
    for title, lines in (("left out", run.left_out), ("FAILED", run.failures)):
        for line in lines:
            print(f"{title}: {line}")
    return 1 if run.failures else 0


def check(run: Run, name: str, shape: Shape) -> None:
    """Errors at float32 and bfloat16 features, and a replayed graph's on new data."""
    found = run.shapes[name]
    problem, other = (make_problem(shape, seed).to(run.device) for seed in (0, 1))
    state = make_state(shape, problem)
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        given, new = (_with_features(p, dtype) for p in (problem, other))
        errors = run.attempt(
            f"{name}: errors, {label}", 20, partial(_errors, shape, given, state, None)
        )
        _judge(run, f"{name}, {label}", errors)
        found.setdefault("errors", {})[label] = errors
        if run.device.type == "cuda":
            errors = run.attempt(
                f"{name}: replayed on new data, {label}",
                20,
                partial(_errors, shape, new, state, given),
            )
            _judge(run, f"{name}, replayed, {label}", errors)
            found["errors"][f"{label}, replayed on new data"] = errors


def _errors(
    shape: Shape, problem: Problem, state: State, captured_with: Problem | None
) -> dict[str, Any]:
    """Ours and torch's errors; ours by a graph that was captured with another problem, if given."""
    problem, sure = with_sure_signs(shape, problem)
    static = (captured_with or problem).to(problem.weight.device)
    module = loss_module(shape, static, state, "triton")
    if captured_with is None:
        results = step(module, static)
    else:
        replay, results = captured(lambda: step(module, static))
        with torch.no_grad():
            for target, source in zip(_changing(static), _changing(problem), strict=True):
                target.copy_(source)
            for result in results:
                result.fill_(torch.nan)  # a replay must write all of it
        state.load(module)
        replay()
    ours = outcome(module, results)
    module = loss_module(shape, problem, state, "torch")
    torch_way = outcome(module, step(module, problem))
    want, largest_logit = exact(shape, problem, state)
    return judged(ours, torch_way, want, sure, largest_logit)


def _changing(problem: Problem) -> tuple[torch.Tensor, ...]:
    return (*problem.differentiable, problem.labels, problem.log_prior)


def _with_features(problem: Problem, dtype: torch.dtype) -> Problem:
    return replace(problem, features=problem.features.detach().to(dtype).requires_grad_())


def _judge(run: Run, what: str, errors: dict[str, dict[str, Any]] | None) -> None:
    for name, found in (errors or {}).items():
        if not found["within"]:
            run.fail(f"{what}: {name}: {found}")


def measure(run: Run, name: str, shape: Shape, ceilings: Ceilings) -> None:
    """Peak memory, times and kernels of what needs no torch.compile."""
    found = run.shapes[name]
    problem = make_problem(shape).to(run.device)
    state = make_state(shape, problem)
    sides: dict[str, Side] = {
        "triton": fused_side(shape, problem, state, "triton"),
        "torch": fused_side(shape, problem, state, "torch"),
        "triton_loss": loss_side(shape, problem, "triton"),
        "cross_entropy": cross_entropy_side(shape, problem),
    }
    why = why_not_eager(shape, free_bytes(run.device))
    if why:
        found["no_eager"] = why
    else:
        sides["eager"] = eager_side(shape, problem)
    run.attempt(f"{name}: times", 15, lambda: found.update(_times(run, name, sides)))
    found["kernels"] = run.attempt(
        f"{name}: kernels", 10, lambda: kernel_rows(shape, problem, state, run.watch, ceilings)
    )


def add_compiled(run: Run, name: str, shape: Shape, contestant: str) -> None:
    """The times of a compiled contestant, next to Triton's own of the same minutes."""
    found = run.shapes[name]
    if contestant == "eager_compiled" and "no_eager" in found:
        return

    def call() -> None:
        torch._dynamo.reset()
        counters.clear()
        problem = make_problem(shape).to(run.device)
        state = make_state(shape, problem)
        if contestant == "torch_compiled":
            side = fused_side(shape, problem, state, "torch", run.compiler)
        else:
            side = eager_side(shape, problem, run.compiler)
        sides = {"triton": fused_side(shape, problem, state, "triton"), contestant: side}
        times = found[f"with_{contestant}"] = _times(run, name, sides)
        # What was compiled, so that a contestant that fell back to eager is seen as such.
        times["graphs"] = counters["stats"]["unique_graphs"]
        times["graph_breaks"] = sum(counters["graph_break"].values())

    run.attempt(f"{name}: {contestant}", 45, call)


def _times(run: Run, name: str, sides: dict[str, Side]) -> dict[str, Any]:
    """Peak bytes and milliseconds of each side, and ratios to Triton round by round."""
    found: dict[str, Any] = {"peak_bytes": {}}
    usable: dict[str, Side] = {}
    for side, call in sides.items():
        try:
            call()  # compiles what is to be compiled, outside the figures
            found["peak_bytes"][side] = peak_bytes(call, run.device)
            usable[side] = call
        except torch.OutOfMemoryError as error:
            found.setdefault("out_of_memory", {})[side] = _brief(error)
            release()
        except Exception as error:
            run.fail(f"{name}: {side}: {_brief(error)}")
    found["launched"] = _compared(run.watch.interleave(usable, host=True))
    if run.device.type == "cuda":
        replays = {}
        for side, call in usable.items():
            try:
                replays[side], _ = captured(call)
            except Exception as error:
                found.setdefault("not_captured", {})[side] = _brief(error)
                torch.cuda.synchronize()
                if side.startswith("triton"):
                    run.fail(f"{name}: {side} is not captured: {_brief(error)}")
        found["replayed"] = _compared(run.watch.interleave(replays, host=False))
    return found


def _compared(taken: Mapping[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ms": {side: 1e3 * statistics.median(seconds) for side, seconds in taken.items()}
    }
    if "triton" in taken:
        found["by_triton"] = {
            side: ratio(seconds, taken["triton"])
            for side, seconds in taken.items()
            if side != "triton"
        }
    return found


def report(run: Run, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "machine": describe(run.device),
        "ceilings": {
            "copy_bytes_per_second": ceilings.bytes,
            "float32_operations_per_second": ceilings.float32,
            "tf32_operations_per_second": ceilings.tf32,
        },
        "seconds": time.monotonic() - run.begin,
        "meaning": MEANING,
        "left_out": run.left_out,
        "failures": run.failures,
        "shapes": run.shapes,
    }


def _refusal(dry: bool) -> str:
    if dry and not INTERPRETED:
        return "expected TRITON_INTERPRET=1 with --dry-run, got none; set it"
    if not dry and INTERPRETED:
        return "expected TRITON_INTERPRET unset, because kernels must run on the GPU; unset it"
    if not dry and not torch.cuda.is_available():
        return "expected a GPU, got none; --dry-run tries the same path on a CPU"
    return ""


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()[:400]


def _file_name(device: torch.device) -> str:
    machine = describe(device)
    name = f"gpu-{machine['name']}-torch{machine['torch']}-triton{machine['triton']}"
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-") + ".json"


if __name__ == "__main__":
    sys.exit(main())
