"""`python -m bench.resources`: what each Triton kernel takes of a GPU, without a GPU.

Every kernel that training launches at a reference shape, with the configuration that ships, is
compiled for each architecture, and its binary read. Exit code 1 if a kernel does not compile, keeps
registers in memory (stack > 0), or wants more shared memory or a larger grid than there is.
With --sample one launch of each kernel, another one for each architecture: a test's breadth.
With --matrix the same of random combinations, see bench/offline/matrix.py.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.measuring.shapes import SHAPES
from bench.offline.compiler import SHARED_LIMIT, compiling_for, complaint, figures_of
from bench.offline.launches import recorded
from bench.offline.matrix import run_matrix
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline
from iada_kernels.triton.launch import INTERPRETED, Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(ARCHITECTURES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--sample", action="store_true", help="one launch of each kernel")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--matrix", action="store_true", help="random combinations, not the shapes")
    parser.add_argument("--count", type=int, default=448, help="combinations of the matrix")
    parser.add_argument("--seed", type=int, default=0, help="of the matrix")
    options = parser.parse_args()
    if INTERPRETED:
        print(
            "bench.resources: expected TRITON_INTERPRET unset, because interpreted kernels cannot "
            f"be compiled, got {os.environ.get('TRITON_INTERPRET')!r}; unset it",
            file=sys.stderr,
        )
        return 2
    if options.matrix:
        return run_matrix(options.arch, options.count, options.seed, options.json)
    rows = measured(options.arch, options.shapes, options.jobs, options.sample)
    machine = environment()
    print(headline(machine, {"compiler": f"triton {machine['triton']}; nothing is run"}) + "\n")
    print(HEADER)
    print("\n".join(map(table_row, rows)))
    print("\nimagenet-lowrank is left out: Σ is full or diag in this build.")
    if options.json:
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        write_text(
            options.json, f'{{\n "machine": {json.dumps(machine)},\n "rows": [\n  {lines}\n ]\n}}\n'
        )
    failed = [row for row in rows if row["complaint"]]
    print(f"{len(rows)} kernels at their shapes, {len(failed)} that do not fit")
    for line in summary(failed):
        print(f"  {line}")
    return 1 if failed else 0


def measured(
    architectures: list[str], shapes: list[str], jobs: int, sample: bool = False
) -> list[dict[str, Any]]:
    """The rows of the table, architecture by architecture, `jobs` of them at a time."""
    if jobs == 1 or len(architectures) == 1:
        return [row for name in architectures for row in rows_of(name, shapes, sample)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        found = pool.map(partial(rows_of, shapes=shapes, sample=sample), architectures)
        return [row for rows in found for row in rows]


def rows_of(architecture: str, shapes: list[str], sample: bool = False) -> list[dict[str, Any]]:
    """One row for each kernel, grid and binary of a shape."""
    rows, known, seen = [], dict[int, dict[str, Any]](), set()
    with compiling_for(architecture):
        launches = list(_launches(architecture, shapes))
        for name, part, launch in _sample(architecture, launches) if sample else launches:
            row = {
                "architecture": architecture,
                "shape": name,
                "part": part,
                "kernel": launch.kernel.fn.__name__,
                "grid": list(launch.grid),
                "warps": launch.num_warps,
                **figures_of(launch, architecture, known),
            }
            row["complaint"] = complaint(row)
            key = json.dumps({**row, "part": ""})
            if key not in seen:
                seen.add(key)
                rows.append(row)
    return rows


Named = tuple[str, str, Launch]  # shape, part


def _launches(architecture: str, shapes: list[str]) -> Iterator[Named]:
    for name in shapes:
        for part, launches in recorded(SHAPES[name], architecture):
            yield from ((name, part, launch) for launch in launches)


def _sample(architecture: str, launches: list[Named]) -> list[Named]:
    """One of each kernel's launches: the first of them for the first architecture, and so on."""
    by_kernel: dict[str, list[Named]] = {}
    for each in launches:
        by_kernel.setdefault(each[2].kernel.fn.__name__, []).append(each)
    place = ARCHITECTURES.index(architecture) if architecture in ARCHITECTURES else 0
    return [found[place * len(found) // len(ARCHITECTURES)] for found in by_kernel.values()]


def summary(failed: list[dict[str, Any]]) -> list[str]:
    """One line for each complaint, with the shapes that share it."""
    shapes: dict[str, list[str]] = {}
    for row in failed:
        line = f"{row['architecture']} {row['kernel']} ({row['part']}) {row['complaint']}"
        shapes.setdefault(line, []).append(row["shape"])
    return [f"{line}: {', '.join(dict.fromkeys(names))}" for line, names in shapes.items()]


HEADER = (
    "| arch | shape | part | kernel | grid | warps | registers | stack | shared | limit |\n"
    "|---|---|---|---|---|---:|---:|---:|---:|---:|"
)


def table_row(row: dict[str, Any]) -> str:
    figures = ("registers", "stack", "shared", "limit")
    cells = [
        *(row[name] for name in ("architecture", "shape", "part", "kernel")),
        "×".join(map(str, row["grid"])),
        row["warps"],
        *(row.get(name, "fails") for name in figures),
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
