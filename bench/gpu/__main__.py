"""`python -m bench.gpu`: the Triton kernels on this GPU: right, capturable, and how fast.

At every reference shape: value, gradients and update against float64, judged by torch's own error;
one step captured in a CUDA graph and replayed on new data; peak memory; then times, interleaved,
with cold caches, launch by launch (the host's share counts) and as replays of CUDA graphs (the
device alone); each kernel's share of what the machine's bandwidth and matrix products allow; the
loss without ε, Σ and log π beside plain cross-entropy. Writes one JSON, anew after each shape;
exit code 1 if anything is wrong. What the budget leaves no time for is named; `--resume` goes on.

`--full` runs more than that, in calls of ten minutes: see `bench.gpu.half_hour`.
`--dry-run` takes the same path on a CPU with tiny shapes and interpreted kernels.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu import parts
from bench.gpu.contestants import MEANING
from bench.gpu.device import Ceilings, describe
from bench.gpu.half_hour import add_half_hour, half_hour
from bench.gpu.parts import Run
from bench.gpu.table import table
from bench.measuring.shapes import SHAPES, Shape
from iada.utils.files import write_text
from iada_kernels.dispatch import INTERPRETED
from iada_kernels.environment import headline, triton_version

# The shapes that the targets name come first.
ORDER = (
    "cifar100-r32",
    "imagenet-diag",
    "cifar100-wrn",
    "subpop-r50",
    "cifar10-r32",
    "civil-bert",
    "inat-diag",
    "dense",
)
TINY = {
    shape.name: shape
    for shape in (
        Shape("tiny-full", 12, 3, 8, "full"),
        Shape("tiny-diag", 12, 4, 8, "diag"),
        Shape("tiny-dense", 40, 3, 8, "full", "skewed"),
    )
}


PARTS: dict[str, Callable[[Run, str, Shape], None]] = {
    "errors": parts.errors,
    "times": parts.measure,
    "floor": parts.floor,
    "torch-compiled": parts.torch_compiled,
    "eager-compiled": parts.eager_compiled,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=450, help="seconds in all (default 450)")
    parser.add_argument("--shapes", nargs="+", choices=ORDER, metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--resume", action="store_true", help="leave out what the JSON has")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    add_half_hour(parser)
    options = parser.parse_args()
    why = _refusal(options.dry_run)
    if why:
        print(f"bench.gpu: {why}", file=sys.stderr)
        return 2
    if options.full:
        return half_hour(options)
    device = torch.device("cpu" if options.dry_run else "cuda")
    path = options.out / _file_name(device)
    before = json.loads(path.read_text()) if options.resume and path.exists() else {}
    ceilings = Ceilings(*before["ceilings"].values()) if before else None
    run = Run(device, options.budget, ceilings)
    shapes = TINY if options.dry_run else {name: SHAPES[name] for name in options.shapes or ORDER}
    run.shapes = before.get("shapes", {})
    run.failures = before.get("failures", {})
    if "errors" not in options.again:
        run.plans = before.get("plans", run.plans)
    for name, shape in shapes.items():
        run.shapes.setdefault(name, {"shape": str(shape), "parts": []})
    for part in options.parts:
        run.part = part
        if part in options.again:
            run.failures.pop(part, None)
        for name, shape in shapes.items():
            done = run.shapes[name]["parts"]
            if part in options.again and part in done:
                done.remove(part)
            if part not in done:
                waiting = len(run.left_out)
                PARTS[part](run, name, shape)
                if len(run.left_out) == waiting:
                    done.append(part)
                write_text(path, json.dumps(report(run), indent=1) + "\n")
    contestants = f"{headline(describe(run.device), MEANING)}; triton {triton_version()}"
    print(f"\n{path}\n\n{contestants}\n\n{table(run.shapes, run.ceilings)}")
    failed = [line for part in options.parts for line in run.failures.get(part, ())]
    for title, lines in (("left out", run.left_out), ("FAILED", failed)):
        for line in lines:
            print(f"{title}: {line}")
    return 1 if failed else 0


def report(run: Run) -> dict[str, Any]:
    return {
        "machine": describe(run.device),
        "ceilings": {
            "copy_bytes_per_second": run.ceilings.bytes,
            "float32_operations_per_second": run.ceilings.float32,
            "tf32_operations_per_second": run.ceilings.tf32,
        },
        "seconds": time.monotonic() - run.begin,
        "meaning": MEANING,
        "plans": run.plans,
        "left_out": run.left_out,
        "failures": run.failures,
        "shapes": run.shapes,
    }


def _refusal(dry: bool) -> str:
    if dry and not INTERPRETED:
        return "expected TRITON_INTERPRET=1 with --dry-run, got none; set it"
    if not dry and INTERPRETED:
        return "expected TRITON_INTERPRET unset, because kernels must run on the GPU; unset it"
    if not dry and not torch.cuda.is_available():
        return "expected a GPU, got none; --dry-run tries the same path on a CPU"
    return ""


def _file_name(device: torch.device) -> str:
    machine = describe(device)
    name = f"gpu-{machine['name']}-torch{machine['torch']}-triton{machine['triton']}"
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-") + ".json"


if __name__ == "__main__":
    sys.exit(main())
