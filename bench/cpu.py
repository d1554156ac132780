"""`python -m bench.cpu`: the native CPU backend against torch, at every reference shape.

A step is forward, backward (features, weight, bias, epsilon) and the streaming covariance update.
Three sides take turns, with 1 and 2 threads: `eager_loss` with the estimator of the ISDA code, the
torch closed forms, native. Also forward and backward alone against plain `cross_entropy(linear)`.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import iada
from bench.isda import ISDAEstimator
from bench.shapes import EAGER_LIMIT, IGNORED, SHAPES, Problem, make_problem
from bench.timing import interleave, ratio
from iada_kernels import native


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows = []
    print(HEADER)
    for name in options.shapes:
        for threads in options.threads:
            torch.set_num_threads(threads)
            rows.append(timed_row(name, options.rounds))
            print(table_row(rows[-1]), flush=True)
    if options.json:
        machine = {
            "cpu": platform.machine(),
            "instruction_set": native.instruction_set(),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def timed_row(name: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each side, and medians of the ratios round by round."""
    shape, problem = SHAPES[name], make_problem(SHAPES[name])
    sides: dict[str, Callable[[], object]] = {
        "native": _step(problem, "native"),
        "torch": _step(problem, "torch"),
        "native_loss": lambda: problem.gradients(iada.fused_loss, backend="native"),
        "cross_entropy": lambda: _cross_entropy(problem),
    }
    if shape.eager_bytes < EAGER_LIMIT:
        sides["eager"] = _eager_step(problem)
    taken = interleave(sides, rounds)
    row: dict[str, Any] = {"shape": str(shape), "threads": torch.get_num_threads()}
    for side, seconds in taken.items():
        row[side + "_ms"] = 1e3 * statistics.median(seconds)
    row["torch_by_native"] = ratio(taken["torch"], taken["native"])
    row["loss_by_cross_entropy"] = ratio(taken["native_loss"], taken["cross_entropy"])
    row["eager_bytes"] = shape.eager_bytes
    if "eager" in taken:
        row["eager_by_native"] = ratio(taken["eager"], taken["native"])
    return row


def _step(problem: Problem, backend: str) -> Callable[[], object]:
    num_classes, width = problem.weight.shape
    structure = "full" if problem.covariance.dim() == 3 else "diag"
    state = iada.ClassCovariance(num_classes, width, structure)

    def step() -> object:
        state.update(
            problem.features.detach(), problem.labels, ignore_index=IGNORED, backend=backend
        )
        return problem.gradients(iada.fused_loss, backend=backend)

    return step


def _eager_step(problem: Problem) -> Callable[[], object]:
    num_classes, width = problem.weight.shape
    estimator = ISDAEstimator(num_classes, width, full=problem.covariance.dim() == 3)

    def step() -> object:
        estimator.update(problem.features.detach(), problem.labels)
        return problem.gradients(iada.eager_loss)

    return step


def _cross_entropy(problem: Problem) -> object:
    logits = F.linear(problem.features, problem.weight, problem.bias)
    value = F.cross_entropy(logits, problem.labels, ignore_index=IGNORED)
    return torch.autograd.grad(value, (problem.features, problem.weight, problem.bias))


HEADER = (
    "| shape (N, C, A, Σ) | threads | eager, ms | torch, ms | native, ms "
    "| eager / native | torch / native | native loss / cross-entropy |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def table_row(row: dict[str, Any]) -> str:
    eager, times = f"needs {row['eager_bytes'] / 1e9:.0f} GB", ""
    if "eager_ms" in row:
        eager, times = f"{row['eager_ms']:.2f}", f"{row['eager_by_native']:.1f}×"
    return (
        f"| {row['shape']} | {row['threads']} | {eager} | {row['torch_ms']:.2f} "
        f"| {row['native_ms']:.2f} | {times} | {row['torch_by_native']:.2f}× "
        f"| {row['loss_by_cross_entropy']:.2f}× |"
    )


if __name__ == "__main__":
    sys.exit(main())
