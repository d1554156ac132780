"""`python -m bench.cpu`: the native CPU backend against torch, at every reference shape.

A step is forward, backward (features, weight, bias, epsilon) and the streaming covariance update:
one call of `IADALoss`. Three sides take turns, with 1 and 2 threads: `eager_loss` with ISDA's
estimator, the torch closed forms, native. Also forward and backward alone against plain
`cross_entropy(linear)`, and what the meta step asks for against the closed forms: the hypergradient
with the step of Σ along it, and the characteristics of a batch.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import iada
from bench.measuring.isda import ISDAEstimator
from bench.measuring.shapes import EAGER_LIMIT, IGNORED, SHAPES, Problem, make_problem
from bench.measuring.timing import interleave, ratio
from iada.utils.files import write_text
from iada_kernels import native, torch_ops
from iada_kernels.contract import Backend, HeadTangents, LossOptions
from iada_kernels.dispatch import served_by
from iada_kernels.environment import environment, headline
from iada_kernels.native import library

CONTESTANTS = {
    "eager": "iada.eager_loss with ISDA's estimator",
    "torch": "torch operators",
    "cross-entropy": "torch's cross_entropy(linear)",
}
LARGEST_BATCH = 10_000  # characteristics compare each sample with each other one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if not native.is_available():
        print(
            f"bench.cpu: expected the native library, got none: {library.WHY_MISSING}. "
            f"{library.REMEDY}",
            file=sys.stderr,
        )
        return 2
    contestants = CONTESTANTS | {"native": served_by("native", torch.device("cpu"))}
    machine = environment() | {"threads": ", ".join(map(str, options.threads))}
    print(headline(machine, contestants) + "\n")
    tables: dict[str, list[dict[str, Any]]] = {}
    for table, (header, timed, text) in TABLES.items():
        print(header)
        rows = tables[table] = []
        for name in options.shapes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                rows.append(timed(name, options.rounds))
                print(text(rows[-1]), flush=True)
        print()
    if options.json:
        written = {"machine": machine, "contestants": contestants, **tables}
        write_text(options.json, json.dumps(written, indent=1) + "\n")
    return 0


def timed_row(name: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each side, and medians of the ratios round by round."""
    shape, problem = SHAPES[name], make_problem(SHAPES[name])
    sides: dict[str, Callable[[], object]] = {
        "native": _step(problem, "native"),
        "torch": _step(problem, "torch"),
        "native_loss": lambda: problem.gradients(iada.fused_loss, backend="native"),
        "cross_entropy": lambda: problem.cross_entropy(IGNORED),
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


def timed_meta_row(name: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of both sides, and medians of the ratios round by round."""
    shape, problem = SHAPES[name], make_problem(SHAPES[name])
    row: dict[str, Any] = {"shape": str(shape), "threads": torch.get_num_threads()}
    parts = {"hypergradient": _hypergradient}
    if shape.samples <= LARGEST_BATCH:
        parts["characteristics"] = _characteristics
    for part, call in parts.items():
        sides = {"native": call(problem, native), "torch": call(problem, torch_ops)}
        taken = interleave(sides, rounds)
        for side, seconds in taken.items():
            row[f"{part}_{side}_ms"] = 1e3 * statistics.median(seconds)
        row[part + "_torch_by_native"] = ratio(taken["torch"], taken["native"])
    return row


def _step(problem: Problem, backend: str) -> Callable[[], object]:
    num_classes, width = problem.weight.shape
    structure = "full" if problem.covariance.dim() == 3 else "diag"
    loss = iada.IADALoss(
        num_classes, width, structure=structure, ignore_index=IGNORED, backend=backend
    )
    loss.log_prior = problem.log_prior
    p = problem

    def step() -> object:
        value = loss(p.features, p.weight, p.bias, p.labels, p.epsilon)
        return torch.autograd.grad(value, p.differentiable)

    return step


def _eager_step(problem: Problem) -> Callable[[], object]:
    num_classes, width = problem.weight.shape
    estimator = ISDAEstimator(num_classes, width, full=problem.covariance.dim() == 3)

    def step() -> object:
        estimator.update(problem.features.detach(), problem.labels)
        return problem.gradients(iada.eager_loss)

    return step


def _hypergradient(problem: Problem, passes: Backend) -> Callable[[], object]:
    inputs = problem.loss_inputs()
    weight, sigma = inputs.weight, problem.covariance.clone()
    options = LossOptions(0.5, 1.0, IGNORED, "mean")
    generator = torch.Generator().manual_seed(1)
    moving = problem.differentiable[:3]
    tangents = HeadTangents(*(torch.randn(t.shape, generator=generator) for t in moving))

    def call() -> object:
        gradient, sums = passes.hypergradient(inputs, options, tangents, True)
        passes.covariance_step(sigma, weight, tangents.weight, sums, -1e-6)
        return gradient

    return call


def _characteristics(problem: Problem, passes: Backend) -> Callable[[], object]:
    p = problem.loss_inputs()
    logits = F.linear(p.features, p.weight, p.bias)
    return lambda: passes.characteristics(p.features, logits, p.labels, p.weight, 5)


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


META_HEADER = (
    "| shape (N, C, A, Σ) | threads | hypergradient native, ms | torch / native "
    "| characteristics native, ms | torch / native |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def meta_table_row(row: dict[str, Any]) -> str:
    cells = [row["shape"], str(row["threads"])]
    for part in ("hypergradient", "characteristics"):
        if part + "_native_ms" in row:
            cells += [f"{row[part + '_native_ms']:.2f}", f"{row[part + '_torch_by_native']:.2f}×"]
        else:
            cells += ["", ""]
    return f"| {' | '.join(cells)} |"


TABLES = {
    "rows": (HEADER, timed_row, table_row),
    "meta": (META_HEADER, timed_meta_row, meta_table_row),
}


if __name__ == "__main__":
    sys.exit(main())
