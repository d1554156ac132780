"""The device time of each launch of a training step, and its share of the machine's ceiling."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.accuracy import ALPHA, BETA, State
from bench.gpu.device import Ceilings, Stopwatch
from bench.measuring.shapes import Problem, Shape
from bench.offline.launches import backend_step, relaunch
from bench.offline.work import work_of
from iada_kernels.contract import ClassStatistics, LossOptions
from iada_kernels.triton.launch import Launch, recording

REPEATS = 15


def kernel_rows(
    shape: Shape, problem: Problem, state: State, watch: Stopwatch, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """One row for each launch of a step, in order.

    share: the time that bytes or operations take at the ceiling, over the time taken. A launch is
    timed with cold caches in its place within the step, or alone where no profiler sees the device.
    """
    call = step_of(shape, problem, state)
    with recording() as launches:
        call()
    taken = _profiled(call, launches, watch)
    source = "profiler" if taken else "events"
    taken = taken or [watch.median(partial(relaunch, launch)) for launch in launches]
    present = problem.labels[problem.labels != shape.ignore_index].unique().numel()
    rows = []
    for launch, seconds in zip(launches, taken, strict=True):
        work = work_of(launch, present)
        moving = work.bytes / ceilings.bytes
        computing = work.float_operations / ceilings.operations(launch.arguments.get("DOT"))
        rows.append(
            {
                "kernel": launch.kernel.fn.__name__,
                "grid": list(launch.grid),
                "ms": 1e3 * seconds,
                "bytes": work.bytes,
                "float_operations": work.float_operations,
                "bound": "bytes" if moving >= computing else "operations",
                "share": max(moving, computing) / seconds,
                "timed_by": source,
            }
        )
    return rows


def step_of(shape: Shape, problem: Problem, state: State) -> Callable[[], object]:
    """One training step, without autograd: its own thread would hide the backward's launches."""
    covariance, mean, count = (t.clone() for t in (state.covariance, state.mean, state.count))
    inputs = problem.loss_inputs()._replace(covariance=covariance)
    options = LossOptions(ALPHA, BETA, shape.ignore_index, "mean")
    return backend_step(inputs, options, ClassStatistics(mean, count))


def _profiled(
    call: Callable[[], object], launches: Sequence[Launch], watch: Stopwatch
) -> list[float] | None:
    """Median seconds of each launch within the step, None where the profiler sees none."""
    if watch.device.type != "cuda":
        return None
    names = [launch.kernel.fn.__name__ for launch in launches]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            watch.seconds(call, host=False)
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.name, event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return matched(events, names, REPEATS)


def matched(
    events: Sequence[tuple[float, str, float]], names: Sequence[str], repeats: int
) -> list[float] | None:
    """Median seconds of each name's place in the sequence, from (start, name, µs) in any order.

    None unless the events of these names are the sequence, `repeats` times over.
    """
    ours = [(name, spent) for _, name, spent in sorted(events) if name in set(names)]
    if [name for name, _ in ours] != list(names) * repeats:
        return None
    size = len(names)
    return [statistics.median(spent for _, spent in ours[i::size]) / 1e6 for i in range(size)]
