"""`python -m bench.resources --matrix`: random combinations, compiled for each architecture.

Each kernel that the launchers would launch must compile, ask for no more shared memory than there
is, and keep nothing of a thread in memory. A float64 kernel may keep up to FLOAT64_STACK bytes: its
numbers take two registers each, and only tests are as small as it is slow. Binaries that several
launches share are compiled once.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.offline.combinations import Combination, combinations, recorded_launches
from bench.offline.compiler import SHARED_LIMIT, compiling_for, complaint, figures_of
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline

FLOAT64_STACK = 1024  # bytes a thread; written down before the first matrix was measured


def matrix_rows(architecture: str, given: Iterable[Combination]) -> list[dict[str, Any]]:
    """One row for each kernel and dtype of sums: how many, and the most that any of them takes."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    known: dict[int, dict[str, Any]] = {}
    with compiling_for(architecture):
        for combination in given:
            for part, launch in recorded_launches(combination, architecture):
                name, before = launch.kernel.fn.__name__, len(known)
                figures = figures_of(launch, architecture, known)
                is_double = "fp64" in str(launch.arguments.get("ACC"))
                row = rows.setdefault(
                    (name, "float64" if is_double else "float32"),
                    {"launches": 0, "all_registers": 0, "binaries": 0, "failed": []},
                )
                row["launches"] += 1
                row["all_registers"] += figures.get("all_registers", False)
                row["binaries"] += len(known) - before
                for figure in ("registers", "stack", "spilled", "shared"):
                    row[figure] = max(row.get(figure, 0), figures.get(figure, 0))
                text = complaint({**figures, "grid": launch.grid}, FLOAT64_STACK * is_double)
                if text and not any(text == earlier["complaint"] for earlier in row["failed"]):
                    described = {"part": part, **combination.described()}
                    row["failed"].append({"complaint": text, "combination": described})
    return [
        {"architecture": architecture, "kernel": name, "sums": sums, **row}
        for (name, sums), row in sorted(rows.items())
    ]


def run_matrix(architectures: list[str], count: int, seed: int, path: Path | None) -> int:
    """Print the table; write it, architecture by architecture, so that a long run can be read."""
    given, rows = combinations(count, seed), []
    machine = environment()
    print(headline(machine, {"compiler": f"triton {machine['triton']}; nothing is run"}))
    print(f"{count} combinations of seed {seed}\n\n{HEADER}")
    for architecture in architectures:
        began = time.perf_counter()
        rows += matrix_rows(architecture, given)
        for row in rows:
            if row["architecture"] == architecture:
                print(table_row(row), flush=True)
        print(f"{architecture}: {time.perf_counter() - began:.0f} s", flush=True)
        if path is not None:
            written = {
                "machine": machine,
                "combinations": count,
                "seed": seed,
                "float64_stack": FLOAT64_STACK,
                "shared_limit": {name: SHARED_LIMIT[name] for name in architectures},
            }
            lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
            head = json.dumps(written, ensure_ascii=False)[1:-1]
            write_text(path, f'{{{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    failed = [(row, each) for row in rows for each in row["failed"]]
    for row, each in failed:
        print(row["architecture"], row["kernel"], each["complaint"], each["combination"])
    print(f"{sum(row['binaries'] for row in rows)} binaries, {len(failed)} complaints")
    return 1 if failed else 0


HEADER = (
    "| arch | kernel | sums | launches | of them with all registers | binaries "
    "| registers | stack | spilled | shared | failed |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def table_row(row: dict[str, Any]) -> str:
    names = ("architecture", "kernel", "sums", "launches", "all_registers", "binaries")
    figures = ("registers", "stack", "spilled", "shared")
    cells = [*(row[name] for name in (*names, *figures)), len(row["failed"])]
    return f"| {' | '.join(map(str, cells))} |"
