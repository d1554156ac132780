"""`python -m bench`: forward and backward of `fused_loss` against `eager_loss` on this CPU."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import iada
from bench.memory import peak_bytes
from bench.shapes import IGNORED, SHAPES, Problem, make_problem
from bench.timing import interleave, ratio

TIMED = (
    "cifar10-r32",
    "cifar100-r32",
    "cifar10-wrn",
    "cifar100-wrn",
    "subpop-r50",
    "civil-bert",
    "imagenet-diag",
)
LIMIT = 12e9  # bytes: an eager form that needs more is not tried


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--shapes", nargs="+", choices=TIMED, default=TIMED, metavar="NAME")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--memory-of", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(extra_memory(options.memory_of))
        return 0
    rows = [timed_row(name, options.rounds) for name in options.shapes]
    print(speed_table(rows))
    dense = memory_row("dense")
    print(
        f"\ndense {dense['shape']}: the eager form needs {dense['eager_bytes'] / 1e9:,.0f} GB; "
        f"fused peaks at {dense['fused_bytes'] / 1e6:.1f} MB beyond inputs and gradients, "
        f"{dense['of_logits']:.2f} times N×C floats"
    )
    if options.json:
        machine = {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        options.json.write_text(
            json.dumps({"machine": machine, "speed": rows, "memory": dense}, indent=1) + "\n"
        )
    return 0


def step(loss: Any, problem: Problem) -> tuple[torch.Tensor, ...]:
    """Forward and the gradients of features, weight, bias and epsilon."""
    value = loss(
        problem.features,
        problem.weight,
        problem.bias,
        problem.labels,
        covariance=problem.covariance,
        epsilon=problem.epsilon,
        log_prior=problem.log_prior,
        ignore_index=IGNORED,
    )
    return torch.autograd.grad(value, problem.differentiable)


def eager_bytes(name: str) -> float:
    """What the eager form must hold at once at the least: differences, Σ of each sample, N×C×C."""
    shape = SHAPES[name]
    n, c, a = shape.samples, shape.classes, shape.features
    full = a * a + c * c if shape.structure == "full" else a
    return 4.0 * n * (3 * c * a + full)


def timed_row(name: str, rounds: int) -> dict[str, Any]:
    """One line of the table: median milliseconds of both sides, and the ratio."""
    problem = make_problem(SHAPES[name])
    sides = {"fused": lambda: step(iada.fused_loss, problem)}
    if eager_bytes(name) < LIMIT:
        sides["eager"] = lambda: step(iada.eager_loss, problem)
    taken = interleave(sides, rounds)
    row: dict[str, Any] = {
        "shape": str(SHAPES[name]),
        "fused_ms": 1e3 * statistics.median(taken["fused"]),
        "eager_ms": None,
        "ratio": None,
        "eager_bytes": eager_bytes(name),
    }
    if "eager" in taken:
        row["eager_ms"] = 1e3 * statistics.median(taken["eager"])
        row["ratio"] = ratio(taken["eager"], taken["fused"])
    return row


def speed_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape (N, C, A, Σ) | eager, ms | fused, ms | eager / fused |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        eager = f"needs {row['eager_bytes'] / 1e9:.0f} GB"
        if row["eager_ms"] is not None:
            eager = f"{row['eager_ms']:.2f}"
        times = "" if row["ratio"] is None else f"{row['ratio']:.1f}×"
        lines.append(f"| {row['shape']} | {eager} | {row['fused_ms']:.2f} | {times} |")
    return "\n".join(lines)


def memory_row(name: str) -> dict[str, Any]:
    """Peak memory at one shape, measured in a process of its own."""
    shape = SHAPES[name]
    command = [sys.executable, "-m", "bench", "--memory-of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    extra = int(done.stdout)
    logits = 4 * shape.samples * shape.classes
    return {
        "shape": str(shape),
        "eager_bytes": eager_bytes(name),
        "fused_bytes": extra,
        "of_logits": extra / logits,
    }


def extra_memory(name: str) -> int:
    """Peak of forward and backward beyond the inputs and the returned gradients, in bytes."""
    step(iada.fused_loss, make_problem(SHAPES["cifar10-r32"]))  # libraries load their buffers
    problem = make_problem(SHAPES[name])
    gradients = sum(4 * tensor.numel() for tensor in problem.differentiable)
    return peak_bytes(lambda: step(iada.fused_loss, problem)) - gradients


if __name__ == "__main__":
    sys.exit(main())
