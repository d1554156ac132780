"""`python -m bench.host_time`: what the host does for a step of the Triton kernels, without a GPU.

The launchers run as they ship, on CPU tensors, as replays once a step has been seen: they allocate
scratch and results and start binaries compiled for sm_90; the call that would hand them to the GPU
does nothing. So neither the GPU's driver (a few µs a launch) nor autograd is in the figures, and
torch's own few operators take a CPU's time. With `--against FOLDER` the sources there take turns.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver

from bench.measuring.shapes import SHAPES, Shape, make_problem
from bench.offline.compiler import SHARED_LIMIT, compiling_for
from bench.offline.launches import backend_step, options_of
from iada_kernels.contract import ClassStatistics
from iada_kernels.environment import environment, headline
from iada_kernels.triton import config

ARCHITECTURE = "sm_90"
DEFAULT = ("cifar10-r32", "cifar100-r32", "cifar10-wrn")


class _NoLauncher:
    """Stands where Triton's compiled call of cuLaunchKernel does."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def launching_nothing(architecture: str = ARCHITECTURE) -> Iterator[None]:
    """Kernels inside are compiled for `architecture`, and found, but not run."""
    properties = {"max_shared_mem": SHARED_LIMIT[architecture]}
    with compiling_for(architecture), config.use(config.configuration_for(architecture)):
        driver.active.launcher_cls = _NoLauncher
        driver.active.utils = SimpleNamespace(
            load_binary=lambda *_: (True, 0, 0, 0, 1024),
            get_device_properties=lambda _: properties,
            unload_module=lambda _: None,
        )
        yield


def step_of(shape: Shape) -> Callable[[], object]:
    """Forward, with the update of the statistics, and backward, of the backend alone."""
    stream = ClassStatistics(
        torch.zeros(shape.classes, shape.features), torch.ones(shape.classes, dtype=torch.int64)
    )
    return backend_step(make_problem(shape).loss_inputs(), options_of(shape), stream)


def microseconds(shapes: list[str], seconds: float) -> dict[str, float]:
    """Of one step, by the clock of this process: the median of batches of 50 steps."""
    found = {}
    with launching_nothing():
        for name in shapes:
            step = step_of(SHAPES[name])
            taken: list[float] = []
            for _ in range(20):
                step()
            end = time.process_time() + seconds
            while time.process_time() < end or len(taken) < 5:
                begin = time.process_time()
                for _ in range(50):
                    step()
                taken.append((time.process_time() - begin) / 50)
            found[name] = 1e6 * statistics.median(taken)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(DEFAULT))
    parser.add_argument("--seconds", type=float, default=2.0, help="of processor for each shape")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="sources to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="turns of either, with --against")
    parser.add_argument("--raw", action="store_true", help="print one JSON and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.raw:
        print(json.dumps(microseconds(options.shapes, options.seconds)))
        return 0
    folders = [Path.cwd()] + ([options.against.resolve()] if options.against else [])
    taken: dict[Path, list[dict[str, float]]] = {folder: [] for folder in folders}
    command = [sys.executable, "-m", "bench.host_time", "--raw", "--shapes", *options.shapes]
    for _ in range(options.rounds if options.against else 1):
        for folder in folders:
            done = subprocess.run(
                [*command, "--seconds", str(options.seconds)],
                cwd=folder, check=True, capture_output=True, text=True,
            )  # fmt: skip
            taken[folder].append(json.loads(done.stdout))
    machine = environment()
    backend = f"Triton's launchers, triton {machine['triton']}, {ARCHITECTURE}; nothing is launched"
    print(headline(machine, {"every column": backend}) + "\n")
    print("| shape | " + " | ".join(f"{folder.name}, µs" for folder in folders) + " |")
    print("|---|" + "---:|" * len(folders))
    for name in options.shapes:
        medians = [statistics.median(each[name] for each in taken[folder]) for folder in folders]
        print(f"| {name} | " + " | ".join(f"{median:.0f}" for median in medians) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
