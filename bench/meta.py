"""`python -m bench.meta`: one iteration of Meta-IADA as a ratio to a plain SGD step, on this CPU.

The sides take turns in one run. `interval10` is the mean of ten iterations, of which one makes a
meta step.

Every case is timed twice: with an allocator that keeps what it has, as caching allocators of
accelerators do, and (`_default_malloc`) with glibc's defaults, which give tens of megabytes back
after each step and fetch them again page by page. All sides of a run have the same allocator.

`--compiled` adds a backbone compiled by inductor, which takes minutes: `sgd_compiled`, the plain
step with it, and `compiled`, the iteration. A compiled module is opaque to the exact hypergradient:
that iteration goes by finite differences.

Memory is the most that a step rises above what lies there between steps, each side in a process of
its own: `memory_jvp` as a share of double backward, `memory_low` as a ratio to plain SGD.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import iada
from bench.measuring.memory import peak_bytes
from bench.measuring.timing import interleave, ratio
from iada.models import cifar_resnet
from iada.training.acceleration import SingleGraph
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline

CLASSES = 10
MODES: dict[str, dict[str, Any]] = {
    "double_backward": {"hypergradient": "double-backward"},
    "jvp": {},
    "finite_difference": {"hypergradient": "finite-difference"},
    "blocks5": {"scope": 5},
    "head": {"scope": "head"},
    "interval10": {"interval": 10},
    "low_memory": {"low_memory": True},
}
COMPILED: dict[str, dict[str, Any]] = {
    "sgd_compiled": {},
    "compiled": {"hypergradient": "finite-difference"},
}
MEMORY = {"memory_jvp": ("jvp", "double_backward"), "memory_low": ("low_memory", "sgd")}
# Settings of glibc's malloc: never give memory back; give each large tensor back when it is freed,
# so that the system sees what a step really holds.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Transformer(nn.Module):
    """Four encoder layers over an image's 64 patches of 4×4 pixels; 0.8 million parameters."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(4)
            )
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) → features (N, width)."""
        return self.layers(self.embed(inputs).flatten(2).mT).mean(dim=1)


@dataclass(frozen=True)
class Case:
    """A backbone, its feature width, and the rows of batch and meta batch."""

    backbone: Callable[[], nn.Module]
    width: int
    rows: int


CASES = {
    "resnet32_b64": Case(lambda: cifar_resnet(32), 64, 64),
    "resnet32_b128": Case(lambda: cifar_resnet(32), 64, 128),
    "transformer_b64": Case(Transformer, 128, 64),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.meta", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--compiled", action="store_true", help="also a compiled backbone")
    parser.add_argument("--time-of", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.time_of:
        print(json.dumps(timed_row(options.time_of, options.rounds, options.compiled)))
        return 0
    if options.memory_of:
        print(extra_memory(*options.memory_of))
        return 0
    machine = environment()
    contestants = {
        "SGD": "a plain step without iada",
        "the rest": f"iada.MetaIADA on {machine['backend']}",
    }
    print(headline(machine, contestants) + "\n")
    columns = [*_modes(options.compiled), *MEMORY]
    print("| case | SGD, ms | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * (len(columns) + 1))
    rows: dict[str, Any] = {}
    for name in options.cases:
        memory = memory_row(name)
        for suffix, malloc in (("", KEEPING), ("_default_malloc", {})):
            arguments = ["--time-of", name, "--rounds", str(options.rounds)]
            row = json.loads(_child(arguments + ["--compiled"] * options.compiled, malloc))
            rows[name + suffix] = row = row | memory
            cells = [f"{row['sgd_ms']:.0f}"] + [f"{row[column]:.2f}" for column in columns]
            print(f"| {name}{suffix} | " + " | ".join(cells) + " |", flush=True)
    if options.json:
        rows |= {"machine": machine, "contestants": contestants}
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    return 0


def timed_row(name: str, rounds: int, compiled: bool) -> dict[str, float]:
    """Medians of the ratios to plain SGD round by round; SGD's own median in milliseconds."""
    modes = _modes(compiled)
    sides = {mode: step_of(name, mode) for mode in ("sgd", *modes)}
    once = sides["interval10"]
    sides["interval10"] = lambda: [once() for _ in range(10)]
    taken = interleave(sides, rounds, budget=1e9)
    taken["interval10"] = [seconds / 10 for seconds in taken["interval10"]]
    row = {mode: ratio(taken[mode], taken["sgd"]) for mode in modes}
    return row | {"sgd_ms": 1e3 * statistics.median(taken["sgd"])}


def _modes(compiled: bool) -> dict[str, dict[str, Any]]:
    return MODES | COMPILED if compiled else MODES


def step_of(name: str, mode: str) -> Callable[[], object]:
    """A plain SGD step, or an iteration in one of the modes, on a model and batch of its own."""
    case = CASES[name]
    torch.manual_seed(0)
    backbone, head = case.backbone(), nn.Linear(case.width, CLASSES)
    if mode in COMPILED:
        functorch_config.donated_buffer = False  # the engine keeps a graph for a second backward
        backbone = SingleGraph(backbone)
        backbone.compile(dynamic=False)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    batch, meta_batch = (
        (torch.randn(case.rows, 3, 32, 32), torch.arange(case.rows) % CLASSES) for _ in range(2)
    )
    if mode.startswith("sgd"):

        def step() -> object:
            optimizer.zero_grad()
            loss = F.cross_entropy(head(backbone(batch[0])), batch[1])
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step
    settings = _modes(compiled=True)[mode]
    meta = iada.MetaIADA(backbone, head, optimizer, torch.ones(CLASSES), **settings)
    return lambda: meta.step(batch, meta_batch)


def memory_row(name: str) -> dict[str, float]:
    """The shares of MEMORY, of peaks measured in fresh processes."""
    modes = {mode for pair in MEMORY.values() for mode in pair}
    peaks = {mode: int(_child(["--memory-of", name, mode], RETURNING)) for mode in modes}
    return {key: peaks[mode] / peaks[base] for key, (mode, base) in MEMORY.items()}


def _child(arguments: list[str], malloc: dict[str, str]) -> str:
    """What this program prints in a process of its own, under these settings of glibc's malloc."""
    command = [sys.executable, "-m", "bench.meta", "--threads", str(torch.get_num_threads())]
    return subprocess.run(
        [*command, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | malloc,
    ).stdout


def extra_memory(name: str, mode: str) -> int:
    """Bytes that a step rises above the level between steps; the first has filled all buffers."""
    step = step_of(name, mode)
    step()
    return peak_bytes(step)


if __name__ == "__main__":
    sys.exit(main())
