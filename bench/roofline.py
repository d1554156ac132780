"""`python -m bench.roofline`: predicted times on an H200, before any was measured.

Each kernel of a training step is compiled for sm_90; bytes and operations (offline/work.py), its
grid, and the programs that registers and shared memory let a multiprocessor hold give

    time = start + max(bytes, operations, chain)
    bytes       through memory at its sustained rate, or at what those at work can ask for
    operations  of the multiprocessor that gets most programs, at its sustained rate, of which
                products of single warps (mma.sync, not wgmma) reach a share
    chain       dependent reads, of the longest program or of all shared out × latency / stages

The constants are of the data sheet or assumed, and are written into the JSON with the predictions:
they are there to be found wrong. What torch itself launches (means over classes, filling a counter,
scaling by 1/n) counts with its start alone. Nothing of the host is in it: a step is a CUDA graph.
"""

import argparse
import datetime
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measuring.shapes import SHAPES, Shape, draw_labels
from bench.offline.compiler import CUDA_RESERVED, Usage, compiled, compiling_for, usage
from bench.offline.launches import recorded
from bench.offline.work import Work, work_of
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline
from iada_kernels.triton.head_backward import Grid
from iada_kernels.triton.launch import INTERPRETED, Launch

Arguments = dict[str, Any]  # of a launch, records as `record.field`
Tasks = list[tuple[int, float]]  # programs, dependent reads of each


@dataclass(frozen=True)
class Machine:
    """Seconds, bytes and operations; `sustained` are shares of the data sheet's rates."""

    name: str = "NVIDIA H200 SXM, 141 GB"
    architecture: str = "sm_90"
    multiprocessors: int = 132
    registers: int = 65536
    shared: int = 228 * 1024
    warps: int = 64
    programs: int = 32
    bytes_per_second: float = 4.8e12
    bytes_per_second_each: float = 64 * 1.98e9  # of one multiprocessor, from the second-level cache
    tf32_per_second: float = 494.7e12  # dense
    float32_per_second: float = 66.9e12  # outside tensor cores
    sustained_bytes: float = 0.85  # assumed, of a streaming kernel
    sustained_operations: float = 0.3  # assumed, of tiles this small with their loads converted
    single_warps: float = 0.63  # of the rate by mma.sync, as arXiv:2402.13499 has it for an H100
    start: float = 2.0e-6  # assumed: a kernel of a graph that does nothing, and its gap
    latency: float = 0.8e-6  # assumed: memory to registers, under some load


H200 = Machine()


def resident(machine: Machine, used: Usage, warps: int) -> int:
    """Programs that one multiprocessor holds at a time; registers go in units of 8 a thread."""
    by_registers = machine.registers // (8 * math.ceil(used.registers / 8) * 32 * warps)
    by_shared = machine.shared // (used.shared + CUDA_RESERVED)
    return max(1, min(by_registers, by_shared, machine.warps // warps, machine.programs))


def _cut(axis: str, block: str, times: int = 1) -> Callable[[dict[str, Any]], float]:
    """`times` passes over an axis, `block` of it at a time."""
    return lambda a: times * math.ceil(a[axis] / a[block])


def _softmax_and_loss(a: dict[str, Any]) -> float:
    """By the last program of a tile of rows, and by the last of all."""
    if a["losses"] is None:
        return 0
    loss = 1 + math.ceil(a["sizes.N"] / a["BLOCK"]) / 4 if "reduction.loss" in a else 0
    if a["ALONE"]:
        return loss
    return a["BLOCK_N"] / a["ROWS"] * (2 + _cut("sizes.C", "BLOCK_C", 3)(a)) + loss


def _single_launch_steps(a: dict[str, Any], rows: float) -> float:
    """Labels twice; Σ by 16 columns for each block of classes; products of each block of rows."""
    n, c, width = (a[f"sizes.{axis}"] for axis in "NCA")
    size = {name: a[f"B.{name}"].value for name in ("N", "M", "J", "STEP")}
    steps = 2 * math.ceil(n / size["N"]) + 2
    if a["terms.covariance"] is not None:
        steps += math.ceil(c / size["J"]) * math.ceil(width / 16)
    products = 2 * math.ceil(width / size["STEP"]) + 2 * math.ceil(c / size["STEP"]) + 4
    return steps + math.ceil(rows / size["M"]) * products


def _rows_and_logits(a: Arguments, counts: Sequence[int], programs: int) -> Tasks:
    groups = a["sizes.C"] if "groups.order" in a else 0
    return [
        (groups, 2 * math.ceil(a["sizes.N"] / a["BLOCK"])),
        (programs - groups, 0 if a["z"] is None else 2 + _cut("sizes.A", "BLOCK_A")(a)),
    ]


def _moments_and_sign(a: Arguments, counts: Sequence[int], programs: int) -> Tasks:
    columns, tasks = math.ceil(a["sizes.A"] / a["COLUMNS"]), []
    if "moments.mean" in a:
        programs -= columns * a["sizes.C"]
        passes = 2 if a.get("covariance") is None else 3  # the mean, its residuals, squares
        tasks = [(columns, 2 + passes * math.ceil(rows / a["BLOCK_M"])) for rows in counts]
    if a["sign"] is not None:
        tasks.append((programs, 2 + _cut("sizes.C", "BLOCK_C", 2)(a)))
    return tasks


def _class_pass(a: Arguments, counts: Sequence[int], programs: int) -> Tasks:
    tiles = math.isqrt(programs // a["C"])
    products = math.ceil(a["C"] / a["BLOCK_J"])
    return [
        (tiles * (tiles + 1) // 2, 2 + math.ceil(rows / a["BLOCK_K"]) + products) for rows in counts
    ]


def _head_backward(a: Arguments, counts: Sequence[int], programs: int) -> Tasks:
    rows = min(a["rows_per_split"], a["sizes.N"])
    reads = {
        "sums": math.ceil(rows / a["B.SUMS_N"].value),
        "features": 1 + math.ceil(a["sizes.C"] / a["B.FEATURES_C"].value),
        "weight": 2 + math.ceil(rows / a["B.WEIGHT_N"].value),
    }
    return [
        (math.prod(a[f"{name}_grid.{axis}"] for axis in Grid._fields), reads[name])
        for name in reads
        if f"{name}_grid.rows" in a
    ]


# Of launches whose programs differ: how many there are of each kind that do not leave at once
# (of a class without rows, or above Σ's diagonal), and what one reads.
DEALT: dict[str, Callable[[Arguments, Sequence[int], int], Tasks]] = {
    "rows_and_logits_kernel": _rows_and_logits,
    "moments_and_sign_kernel": _moments_and_sign,
    "class_pass_kernel": _class_pass,
    "head_backward_kernel": _head_backward,
    "single_launch_kernel": lambda a, counts, programs: [
        (1, _single_launch_steps(a, rows)) for rows in counts
    ],
}

# Dependent reads of one program, one for each turn of its loops, where all are alike.
STEPS: dict[str, Callable[[Arguments], float]] = {
    "logits_kernel": lambda a: 2 + _cut("sizes.A", "BLOCK_A")(a),
    "softmax_kernel": lambda a: 2 + _cut("C", "BLOCK_C", 3)(a),
    "class_pass_weight_kernel": lambda a: a["items_per_split"],
    "single_launch_backward_kernel": lambda a: 2 + math.ceil(a["sizes.C"] / a["BLOCK_C"]),
}

# What the program that arrives last reads in the end; for sums reads do not wait.
LAST: dict[str, Callable[[dict[str, Any]], float]] = {
    "class_pass_kernel": lambda a: (
        0 if a.get("partials.total") is None else 1 + a["partials.P"] / 4
    ),
    "logits_kernel": _softmax_and_loss,
    "softmax_kernel": lambda a: 1 + math.ceil(a["N"] / a["BLOCK"]) / 4,
    "class_pass_weight_kernel": lambda a: 1 + len(a["partials"]) / 4,
}


def tasks_of(launch: Launch, arguments: Arguments, counts: Sequence[int]) -> Tasks:
    """Programs that do work, and the dependent reads of each; `counts` as for `predict`."""
    name, programs = launch.kernel.fn.__name__, math.prod(launch.grid)
    if name in DEALT:
        return [task for task in DEALT[name](arguments, counts, programs) if task[0]]
    return [(programs, STEPS[name](arguments))]


def waits(tasks: Tasks, slots: int) -> float:
    """Reads one after the other, with `slots` programs at a time: those alike start in rounds,
    others at best fill each other's gaps but for the longest."""
    if len(tasks) == 1:
        ((programs, reads),) = tasks
        return math.ceil(programs / slots) * reads
    return max(
        max(reads for _, reads in tasks), sum(programs * reads for programs, reads in tasks) / slots
    )


def predict(
    machine: Machine,
    launch: Launch,
    used: Usage,
    work: Work,
    counts: Sequence[int],
    has_wgmma: bool = True,
) -> dict[str, Any]:
    """Seconds of one launch and what they are made of; `counts` are the rows of classes present."""
    name, arguments = launch.kernel.fn.__name__, launch.leaves()
    tasks = tasks_of(launch, arguments, counts)
    programs = sum(count for count, _ in tasks)
    held = resident(machine, used, launch.num_warps)
    busiest = math.ceil(programs / machine.multiprocessors) / programs  # its share of all work
    rates = {"tf32": machine.tf32_per_second, "tf32x3": machine.tf32_per_second / 3}
    rate = rates.get(str(launch.arguments.get("DOT")), machine.float32_per_second)
    if not has_wgmma:
        rate *= machine.single_warps
    reads = waits(tasks, machine.multiprocessors * held)
    if name in LAST:
        reads += LAST[name](arguments)
    parts = {
        "bytes": max(
            work.bytes / (machine.bytes_per_second * machine.sustained_bytes),
            work.bytes * busiest / machine.bytes_per_second_each,
        ),
        "operations": work.float_operations
        * busiest
        / (rate * machine.sustained_operations / machine.multiprocessors),
        "chain": reads * machine.latency / launch.num_stages,
    }
    bound = max(parts, key=lambda part: parts[part])
    return {
        "kernel": name,
        "grid": list(launch.grid),
        "working_programs": programs,
        "programs_held": held,
        "occupancy": round(held * launch.num_warps / machine.warps, 3),
        "has_wgmma": has_wgmma,
        "registers": used.registers,
        "shared": used.shared,
        "bytes": work.bytes,
        "float_operations": work.float_operations,
        "bound": bound,
        "us": round(1e6 * (machine.start + parts[bound]), 2),
    }


class _TorchLaunches(TorchDispatchMode):
    """Counts operators of torch that compute: each is a kernel of torch on a GPU."""

    # These return memory, fresh or another view of the same.
    FREE: tuple[str, ...] = ("empty", "new_empty", "empty_like", "detach", "view", "_reshape_alias")
    FREE += ("select", "slice", "unsqueeze", "expand", "permute", "transpose", "t", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def predict_step(machine: Machine, shape: Shape) -> dict[str, Any]:
    """Forward, backward and update in float32, as `bench.gpu` measures them."""
    labels = draw_labels(shape, torch.Generator().manual_seed(0))
    counts = [rows for rows in labels[labels != shape.ignore_index].bincount().tolist() if rows]
    with compiling_for(machine.architecture):
        with _TorchLaunches() as torch_launches:
            _, launches = next(recorded(shape, machine.architecture))
        kernels = []
        for launch in launches:
            binary, work = compiled(launch), work_of(launch, len(counts))
            has_wgmma = "wgmma" in binary.asm["ptx"]
            kernels.append(predict(machine, launch, usage(binary), work, counts, has_wgmma))
    names = torch_launches.names
    ours = sum(row["us"] for row in kernels)
    return {
        "shape": str(shape),
        "classes_present": len(counts),
        "largest_class": max(counts),
        "us": round(ours + 1e6 * machine.start * len(names), 1),
        "us_of_bytes_alone": round(
            1e6 * sum(row["bytes"] for row in kernels) / machine.bytes_per_second, 1
        ),
        "launches": len(kernels),
        "torch_launches": names,
        "kernels": kernels,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the predictions to this file")
    options = parser.parse_args()
    if INTERPRETED:
        print("bench.roofline: expected TRITON_INTERPRET unset; unset it", file=sys.stderr)
        return 2
    found = {name: predict_step(H200, SHAPES[name]) for name in options.shapes}
    machine = environment()
    predicted = f"Triton's kernels, triton {machine['triton']}, on {H200.name}; nothing is run"
    print(headline(machine, {"predicted": predicted}) + "\n")
    print("| shape | launches, torch's | predicted µs | of bytes alone | longest |")
    print("|---|---|---:|---:|---|")
    for name, step in found.items():
        longest = max(step["kernels"], key=lambda row: row["us"])
        print(
            f"| {name} | {step['launches']}, {len(step['torch_launches'])} | {step['us']:.0f} "
            f"| {step['us_of_bytes_alone']:.0f} | {longest['kernel']} {longest['us']:.0f} µs, "
            f"{longest['bound']} |"
        )
    if options.json:
        written = {
            "predicted_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "measured": "nothing: written before any run on this GPU",
            "versions": {name: machine[name] for name in ("iada", "triton", "torch")},
            "machine": asdict(H200),
            "shapes": found,
        }
        write_text(options.json, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
