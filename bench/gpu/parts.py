"""What `bench.gpu` asks of each shape: errors, times, contestants that are compiled, the floor.

A part fills in `Run.shapes[name]` and names what went wrong, or what the budget had no time for.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.gpu.accuracy import (
    State,
    exact,
    judged,
    loss_module,
    make_state,
    outcome,
    step,
    with_sure_signs,
)
from bench.gpu.contestants import (
    Side,
    cross_entropy_side,
    eager_side,
    floor_sides,
    fused_side,
    loss_side,
    why_not_eager,
)
from bench.gpu.device import (
    Ceilings,
    Stopwatch,
    captured,
    free_bytes,
    measure_ceilings,
    peak_bytes,
    release,
)
from bench.gpu.kernel_times import kernel_rows
from bench.measuring.shapes import Problem, Shape, make_problem
from bench.measuring.timing import ratio
from iada_kernels.triton import plans


class Run:
    """One run: what was found so far, and the time that is left for more."""

    def __init__(self, device: torch.device, budget: float, ceilings: Ceilings | None) -> None:
        self.device = device
        self.watch = Stopwatch(device) if device.type == "cuda" else Stopwatch(device, rounds=1)
        self.begin, self.budget = time.monotonic(), budget
        self.compiler = "inductor" if device.type == "cuda" else "eager"
        self.left_out: list[str] = []
        self.part = ""  # that is being measured
        self.failures: dict[str, list[str]] = {}  # of each part
        self.shapes: dict[str, dict[str, Any]] = {}
        self.plans = plans.ALLOWED.level  # of calls that repeat; the next once one is refuted
        self.ceilings = ceilings or measure_ceilings(self.watch, small=device.type != "cuda")

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
            with plans.allowing(self.plans):
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
        self.failures.setdefault(self.part, []).append(what)


def errors(run: Run, name: str, shape: Shape) -> None:
    """Errors at float32 and bfloat16 features, and a replayed graph's on new data."""
    found = run.shapes[name]
    problem, other = (make_problem(shape, seed).to(run.device) for seed in (0, 1))
    state = make_state(shape, problem)
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        given, new = (
            replace(p, features=p.features.detach().to(dtype).requires_grad_())
            for p in (problem, other)
        )
        if run.device.type == "cuda":  # nothing is planned elsewhere
            refute_plans(run, f"{name}, {label}", shape, (given, new), state)
        judgement = run.attempt(
            f"{name}: errors, {label}", 20, partial(_errors, shape, given, state, None)
        )
        _judge(run, f"{name}, {label}", judgement)
        found.setdefault("errors", {})[label] = judgement
        if run.device.type == "cuda":
            judgement = run.attempt(
                f"{name}: replayed on new data, {label}",
                20,
                partial(_errors, shape, new, state, given),
            )
            _judge(run, f"{name}, replayed, {label}", judgement)
            found["errors"][f"{label}, replayed on new data"] = judgement


def refute_plans(
    run: Run, what: str, shape: Shape, problems: tuple[Problem, ...], state: State
) -> None:
    """Compare calls that repeat with launches that Triton makes; goes on without what differs."""
    for level, below in (("replays", "plans"), ("plans", "none")):
        if run.plans != level:
            continue
        failures = len(run.failures.get(run.part, ()))
        different = run.attempt(
            f"{what}: {level}", 10, partial(repeated, shape, problems, state, level)
        )
        if different or len(run.failures.get(run.part, ())) > failures:  # or it raises
            run.fail(f"{what}: {level} differ from Triton's launches, so {below}: {different}")
            run.plans = below


def repeated(
    shape: Shape, problems: tuple[Problem, ...], state: State, level: str, rounds: int = 2
) -> list[str]:
    """What in which call differs, in a bit, from a call without plans; the problems take turns.

    They are alike in signature, so that an address of a former call would be seen.
    """
    modules = [loss_module(shape, problem, state, "triton") for problem in problems]

    def results(index: int) -> dict[str, torch.Tensor]:
        module = modules[index]
        state.load(module)
        return outcome(module, step(module, problems[index]))

    with plans.allowing("none"):
        expected = [results(index) for index in range(len(problems))]
    different = []
    with plans.allowing(level):
        for call in range(rounds * len(problems)):
            found, want = results(call % len(problems)), expected[call % len(problems)]
            different += [
                f"{name} of call {call + 1}"
                for name in want
                if not torch.equal(found[name], want[name])
            ]
    return different


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


def _judge(run: Run, what: str, judgement: dict[str, dict[str, Any]] | None) -> None:
    for name, found in (judgement or {}).items():
        if not found["within"]:
            run.fail(f"{what}: {name}: {found}")


def measure(run: Run, name: str, shape: Shape) -> None:
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
        f"{name}: kernels", 10, lambda: kernel_rows(shape, problem, state, run.watch, run.ceilings)
    )


def floor(run: Run, name: str, shape: Shape) -> None:
    """Ours without ε, Σ and log π beside what computes plain cross-entropy and no more."""
    problem = make_problem(shape).to(run.device)
    sides, absent = floor_sides(shape, problem)
    found = run.shapes[name]

    def call() -> None:
        found["floor"] = _times(run, name, sides)
        found["floor"]["not_installed"] = absent

    run.attempt(f"{name}: floor", 15, call)


def torch_compiled(run: Run, name: str, shape: Shape) -> None:
    """The torch closed forms under torch.compile."""
    _compiled(run, name, shape, "torch_compiled")


def eager_compiled(run: Run, name: str, shape: Shape) -> None:
    """The eager loss and ISDA's estimator under torch.compile."""
    _compiled(run, name, shape, "eager_compiled")


def _compiled(run: Run, name: str, shape: Shape, contestant: str) -> None:
    """The times of a compiled contestant, next to Triton's own of the same minutes."""
    from torch._dynamo.utils import counters  # importing it takes as long as importing torch

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


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()[:400]
