"""`python -m bench.scaling`: time and memory of forward and backward over N, C and A, on this CPU.

One size varies at a time, in powers of four, about a middle shape with full and with diagonal Σ.
Each point has a process of its own, where the sides take turns; one thread, whose processor time
counts, so that other work on the machine counts little; memory is the peak beyond inputs and
gradients. Written are a CSV of all numbers with the machine's name, log-log plots (SVG), and a
table of the slopes of the largest sizes beside those of the cost model.
"""

import argparse
import csv
import functools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import iada
from bench.measuring.memory import peak_bytes, return_freed_memory
from bench.measuring.shapes import Problem, Shape, make_problem
from bench.measuring.timing import interleave
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline

AXES = ("samples", "classes", "features", "rank")
MIDDLE = {"full": (128, 128, 128, 0), "diag": (256, 1024, 512, 0), "low-rank": (128, 128, 128, 16)}
SIZES = {
    "full": {
        "samples": (32, 128, 512, 2048),
        "classes": (8, 32, 128, 512),
        "features": (32, 128, 512),
    },
    "diag": {
        "samples": (64, 256, 1024, 4096),
        "classes": (64, 256, 1024, 4096, 16384),
        "features": (32, 128, 512, 2048),
    },
    "low-rank": {
        "samples": (32, 128, 512, 2048),
        "classes": (8, 32, 128, 512),
        "features": (32, 128, 512),
        "rank": (1, 4, 16, 64),
    },
}
EAGER_MOST = 1e9  # bytes of temporaries beyond which the eager forms are not tried
FIGURES = ("ms", "extra_bytes")  # that pictures show
FITTED = 3  # the largest sizes, of which the slope is taken


class Point(NamedTuple):
    """One shape, and the axis that it lies on."""

    axis: str
    shape: Shape

    @property
    def size(self) -> int:
        size: int = getattr(self.shape, self.axis)
        return size


def linear_cross_entropy(problem: Problem) -> object:
    p = problem
    loss = F.linear_cross_entropy(p.features, p.weight, p.labels, linear_bias=p.bias)
    return torch.autograd.grad(loss, (p.features, p.weight, p.bias))


@functools.cache
def compiled_eager() -> Callable[..., torch.Tensor]:
    """Wrapped once: a wrapper for each call would cost it about a millisecond."""
    return torch.compile(iada.eager_loss, dynamic=False)


SIDES: dict[str, Callable[[Problem], object]] = {
    "eager": lambda p: p.gradients(iada.eager_loss),
    "compiled eager": lambda p: p.gradients(compiled_eager()),
    "torch": lambda p: p.gradients(iada.fused_loss, backend="torch"),
    "native": lambda p: p.gradients(iada.fused_loss, backend="native"),
    "cross-entropy": Problem.cross_entropy,
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    SIDES["F.linear_cross_entropy"] = linear_cross_entropy
MEANINGS = {
    "eager": "iada.eager_loss, the form of ISDA's and MetaSAug's code",
    "torch, native": "iada.fused_loss by these backends",
    "cross-entropy": "torch's cross_entropy(linear), without ε, Σ and π",
}


def multiply_adds(shape: Shape, side: str, present: int) -> float:
    """Of the forward and the backward pass, by the products that dominate.

    present: classes that the batch shows. Torch's forms have a row of R for each sample, or for
    each class where these are fewer.
    """
    n, c, a = shape.samples, shape.classes, shape.features
    if "cross" in side:
        return 3.0 * n * c * a
    full = shape.structure == "full"
    if "eager" in side:  # the gradient of a product is two more
        return 3.0 * n * c * a * ((a + c) if full else 1) + 6.0 * n * c * a
    if shape.structure == "low-rank":  # projections, and two products of the backward pass
        return 5.0 * n * c * a + present * c * a * (5.0 + 3.0 * shape.rank)
    rows = present if side == "native" and full else min(n, c)
    return 5.0 * n * c * a + rows * c * a * (a if full else 5.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--structures", nargs="+", choices=MIDDLE, default=list(MIDDLE))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="leave out larger sizes")
    parser.add_argument("--out", type=Path, default=Path("bench/results/scaling"), metavar="FOLDER")
    parser.add_argument(
        "--from", dest="rows", type=Path, metavar="CSV", help="draw these rows, measure nothing"
    )
    options = parser.parse_args()
    from bench.measuring.plots import plot_scaling  # matplotlib is needed here alone

    if options.rows:
        plot_scaling(read_csv(options.rows), options.out)
        return 0
    torch.set_num_threads(1)
    machine = environment()
    print(headline(machine, MEANINGS) + "\n", flush=True)
    rows = []
    for structure in options.structures:
        for axis in options.axes:
            for point in points(structure, axis, options.most):
                for row in measured(point, options.sides, options.rounds):
                    rows.append(row)
                    print(f"{point.shape}: {row['side']} {row['ms']:.3f} ms", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    keys = ("iada", "torch", "python", "processor", "capability", "backend", "threads")
    write_csv(options.out / "scaling.csv", rows, {key: machine[key] for key in keys})
    table = slope_table(rows)
    write_text(options.out / "slopes.md", table + "\n")
    print("\n" + table)
    plot_scaling(rows, options.out)
    return 0


def points(structure: str, axis: str, most: int) -> Iterator[Point]:
    """The shapes along one axis."""
    for size in SIZES[structure].get(axis, ()):
        if size <= most:
            n, c, a, rank = (
                dict(zip(AXES, MIDDLE[structure], strict=True)) | {axis: size}
            ).values()
            yield Point(axis, Shape(f"{axis}-{size}", n, c, a, structure, rank=rank))


def measured(point: Point, sides: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each side that the shape allows: milliseconds, and peak bytes beyond."""
    tried = [side for side in sides if _can(side, point.shape)]
    taken, present = in_a_process(_times, point.shape, tried, rounds)
    shape = point.shape
    sizes = {"N": shape.samples, "C": shape.classes, "A": shape.features, "rank": shape.rank}
    sizes["present"] = present
    place = {"structure": shape.structure, "axis": point.axis, "size": point.size, **sizes}
    rows = []
    for side in tried:
        figures = {
            "ms": 1e3 * statistics.median(taken[side]),
            "ms_least": 1e3 * min(taken[side]),
            "extra_bytes": 0 if "compiled" in side else in_a_process(_extra_bytes, shape, side),
            "multiply_adds": multiply_adds(shape, side, present),
        }
        rows.append({**place, "side": side, **figures})
    return rows


def _can(side: str, shape: Shape) -> bool:
    """Whether a side has this structure, and its temporaries room."""
    if shape.structure == "low-rank":
        return "cross" in side or side == "torch"
    return "eager" not in side or shape.eager_bytes <= EAGER_MOST


def in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """What `call`, a function of this module, gives in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["iada", "bench.measuring.shapes"])  # torch is imported once
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(call, *arguments).result()


def _times(shape: Shape, sides: list[str], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each side, and the number of classes that the batch shows."""
    problem = make_problem(shape)
    calls = {side: functools.partial(SIDES[side], problem) for side in sides}
    taken = interleave(calls, rounds, budget=3, clock=time.process_time)
    return taken, len(problem.labels.unique())


def _extra_bytes(shape: Shape, side: str) -> int:
    return_freed_memory()
    SIDES[side](make_problem(shape))  # libraries load, compilers compile
    problem = make_problem(shape)
    gradients = problem.differentiable[: 3 if "cross" in side else 4]
    return peak_bytes(lambda: SIDES[side](problem)) - sum(t.nbytes for t in gradients)


def write_csv(path: Path, rows: list[dict[str, Any]], machine: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded | machine)


def read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            row | {"size": int(row["size"])} | {key: float(row[key]) for key in FIGURES}
            for row in csv.DictReader(file)
        ]


def lines(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """The rows of each (structure, axis, side), by size."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        grouped.setdefault((row["structure"], row["axis"], row["side"]), []).append(row)
    return grouped


def slope(line: list[dict[str, Any]], figure: str) -> float:
    """d log figure / d log size over the largest sizes, by least squares."""
    last = line[-FITTED:]
    if len(last) < 2:
        return math.nan
    sizes, figures = ([math.log(row[key]) for row in last] for key in ("size", figure))
    return float(np.polyfit(sizes, figures, 1)[0])


def slope_table(rows: list[dict[str, Any]]) -> str:
    text = [
        f"Slopes of the time over the {FITTED} largest sizes, measured / of the cost model.\n",
        f"| Σ, side | {' | '.join(AXES)} |",
        f"|---|{'---:|' * len(AXES)}",
    ]
    grouped = lines(rows)
    for structure, side in dict.fromkeys((key[0], key[2]) for key in grouped):
        cells = []
        for axis in AXES:
            line = grouped.get((structure, axis, side), [])
            measured_slope, modelled = slope(line, "ms_least"), slope(line, "multiply_adds")
            fits = math.isfinite(measured_slope)
            cells.append(f"{measured_slope:.2f} / {modelled:.2f}" if fits else "–")
        text.append(f"| {structure}, {side} | {' | '.join(cells)} |")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
