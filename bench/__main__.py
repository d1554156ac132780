"""`python -m bench`: forward and backward of `fused_loss` against `eager_loss` on this CPU.

`torch` is the fused loss by the torch closed forms, `fused` by the default backend.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import iada
from bench.measuring.memory import peak_bytes
from bench.measuring.shapes import EAGER_LIMIT, SHAPES, make_problem
from bench.measuring.timing import interleave, ratio
from iada.utils.files import write_text
from iada_kernels.dispatch import served_by
from iada_kernels.environment import environment, headline

TIMED = (
    "cifar10-r32",
    "cifar100-r32",
    "cifar10-wrn",
    "cifar100-wrn",
    "subpop-r50",
    "civil-bert",
    "imagenet-diag",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--shapes", nargs="+", choices=TIMED, default=TIMED, metavar="NAME")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the times as well")
    parser.add_argument(
        "--from",
        dest="rows",
        type=Path,
        metavar="JSON",
        help="with --plot: draw these, time nothing",
    )
    parser.add_argument("--memory-of", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(extra_memory(options.memory_of))
        return 0
    if options.plot:
        from bench.measuring.plots import plot_speed  # matplotlib is needed here alone
    if options.rows:
        if not options.plot:
            parser.error("--from: expected --plot beside it, got none; name the picture")
        tables = json.loads(options.rows.read_text())
        plot_speed(tables.get("speed") or tables["rows"], options.plot)
        return 0
    contestants = {
        "eager": "iada.eager_loss",
        "torch": served_by("torch", torch.device("cpu")),
        "fused": served_by(None, torch.device("cpu")),
    }
    machine = environment()
    print(headline(machine, contestants) + "\n", flush=True)
    rows = [timed_row(name, options.rounds) for name in options.shapes]
    print(speed_table(rows))
    dense = memory_row("dense")
    print(
        f"\n{dense['shape']}: the eager form needs {dense['eager_bytes'] / 1e9:,.0f} GB; "
        f"fused peaks at {dense['fused_bytes'] / 1e6:.1f} MB beyond inputs and gradients, "
        f"{dense['of_logits']:.2f} times N×C floats"
    )
    if options.json:
        written = {"machine": machine, "contestants": contestants, "speed": rows, "memory": dense}
        write_text(options.json, json.dumps(written, indent=1) + "\n")
    if options.plot:
        plot_speed(rows, options.plot)
    return 0


def timed_row(name: str, rounds: int) -> dict[str, Any]:
    """One line of the table: median milliseconds of each side, and the ratio to the eager form."""
    shape, problem = SHAPES[name], make_problem(SHAPES[name])
    sides: dict[str, Callable[[], object]] = {
        "fused": lambda: problem.gradients(iada.fused_loss),
        "torch": lambda: problem.gradients(iada.fused_loss, backend="torch"),
    }
    if shape.eager_bytes < EAGER_LIMIT:
        sides["eager"] = lambda: problem.gradients(iada.eager_loss)
    taken = interleave(sides, rounds)
    row: dict[str, Any] = {"shape": str(shape), "eager_bytes": shape.eager_bytes}
    for side, seconds in taken.items():
        row[f"{side}_ms"] = 1e3 * statistics.median(seconds)
    for side in ("fused", "torch"):
        row[f"eager_by_{side}"] = ratio(taken["eager"], taken[side]) if "eager" in taken else None
    return row


def speed_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape (N, C, A, Σ) | eager, ms | torch, ms | fused, ms "
        "| eager / torch | eager / fused |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"needs {row['eager_bytes'] / 1e9:.0f} GB", "", ""]
        if "eager_ms" in row:
            times = [f"{row[key]:.1f}×" for key in ("eager_by_torch", "eager_by_fused")]
            cells = [f"{row['eager_ms']:.2f}", *times]
        eager, by_torch, by_fused = cells
        lines.append(
            f"| {row['shape']} | {eager} | {row['torch_ms']:.2f} | {row['fused_ms']:.2f} "
            f"| {by_torch} | {by_fused} |"
        )
    return "\n".join(lines)


def memory_row(name: str) -> dict[str, Any]:
    """Peak memory at one shape, measured in a process of its own."""
    shape = SHAPES[name]
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "bench", "--memory-of", name, "--threads", threads]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    extra = int(done.stdout)
    logits = 4 * shape.samples * shape.classes
    return {
        "shape": str(shape),
        "eager_bytes": shape.eager_bytes,
        "fused_bytes": extra,
        "of_logits": extra / logits,
    }


def extra_memory(name: str) -> int:
    """Peak of forward and backward beyond the inputs and the returned gradients, in bytes."""
    make_problem(SHAPES["cifar10-r32"]).gradients(iada.fused_loss)  # libraries load their buffers
    problem = make_problem(SHAPES[name])
    gradients = sum(4 * tensor.numel() for tensor in problem.differentiable)
    return peak_bytes(lambda: problem.gradients(iada.fused_loss)) - gradients


if __name__ == "__main__":
    sys.exit(main())
