"""`python -m tests.fuzz --cases 10000 --backend native`: random cases against torch's own error.

Exit code 1 if a case fails; each failure prints the command that repeats it alone.
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before triton is imported, which looks once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from iada_kernels import BACKENDS, select_backend
from tests.fuzz.judge import FACTOR
from tests.fuzz.run import Case, Tally, run_case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--backend", choices=BACKENDS, default="native")
    parser.add_argument("--device", default=None, help="cpu or cuda; cuda for triton where it is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, with every figure")
    parser.add_argument("--json", type=Path, help="keep the result of this backend in this file")
    options = parser.parse_args(arguments)
    cuda = options.backend == "triton" and torch.cuda.is_available()
    device = torch.device(options.device or ("cuda" if cuda else "cpu"))
    select_backend(options.backend, device)  # fails where it cannot serve
    if options.case is not None:
        case = run_case(options.seed, options.case, options.backend, device)
        print(case.kind, *case.results, sep="\n  ")
        return int(case.failed)
    begin, tally = time.perf_counter(), Tally()
    for number in range(options.cases):
        case = run_case(options.seed, number, options.backend, device)
        tally.add(case)
        if case.failed:
            print(f"{case.kind}: {case.worst}\n  {reproducer(case, options.backend, device)}")
        if sys.stderr.isatty() and number % 50 == 0:
            print(f"\r{number}", end="", file=sys.stderr, flush=True)
    found = report(tally, options.backend, device, options.seed, time.perf_counter() - begin)
    print(json.dumps(found, indent=1))
    if options.json:
        keep(options.json, found)
    return int(bool(tally.failed))


def reproducer(case: Case, backend: str, device: torch.device) -> str:
    return (
        f"python -m tests.fuzz --backend {backend} --device {device} "
        f"--seed {case.seed} --case {case.number}"
    )


def report(
    tally: Tally, backend: str, device: torch.device, seed: int, seconds: float
) -> dict[str, Any]:
    worst = {
        kind: {
            "ratio": round(case.worst.ratio, 3),
            "of": case.worst.name,
            "error": case.worst.error,
            "torch_error": case.worst.torch_error,
            "rounding": case.worst.rounding,
            "reproducer": reproducer(case, backend, device),
        }
        for kind, case in sorted(tally.worst.items())
    }
    return {
        "backend": backend
        if backend != "triton" or device.type == "cuda"
        else "triton, by its interpreter",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cases": tally.cases,
        "seed": seed,
        "failed": len(tally.failed),
        "allowed_ratio": FACTOR,
        "results_judged": tally.tensors,
        "results_with_an_error_above_torch's": tally.worse_than_torch,
        "worst_by_pass": worst,
        "seconds": round(seconds),
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "iada")},
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def keep(path: Path, found: dict[str, Any]) -> None:
    """Replace the entry of this backend and device in the file; the others stay."""
    entries = json.loads(path.read_text()) if path.exists() else []
    key = ("backend", "device")
    entries = [e for e in entries if any(e[k] != found[k] for k in key)] + [found]
    entries.sort(key=lambda entry: [entry[k] for k in key])
    path.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
