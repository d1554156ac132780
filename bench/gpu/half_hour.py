"""`python -m bench.gpu --full`: the first half hour on a GPU as one program, ten minutes a call.

In this order, because nothing that is wrong need be timed:

    errors      plans and replays against Triton's own launches, bit for bit: what differs is done
                without from there on; value, gradients and update at every reference shape,
                against float64
    memcheck, racecheck, initcheck    compute-sanitizer over `bench.one_step`
    times       against eager, the torch forms and each kernel's ceiling
    floor       without ε, Σ and log π against plain cross-entropy, Liger, cut-cross-entropy
    compiled    against compiled eager and compiled torch forms
    tiles       `bench.tiles`: a launch configuration ready to commit
    counters    ncu on the three slowest kernels
    training    CIFAR-10 LT by `iada paper`, with `--data`, for what is left

Each stage is a process of its own. What it printed, how it ended and how long it took is in
`stages.json` as soon as it ends, its output beside it. A stage that the call has no time for, or
that was stopped, is for the next call, which goes on behind the stages that ended; `--again NAME`
runs one of these anew.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.device import describe
from iada.utils.files import atomic_write
from iada_kernels.triton.plans import ALLOWED_BY

REPORT = "stages.json"
TAIL = 4000  # characters of what a stage printed that are kept
ATTEMPTS = 2  # at a stage under a tool that the call had to stop
LEAVE = 10.0  # seconds of a call for its own end
SANITIZERS = ("memcheck", "racecheck", "initcheck")
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
)
DONE, FAILED, STOPPED, ABSENT = "done", "failed", "stopped", "not here"
GAVE_UP = "stopped too often"


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds below which it is not begun and after which it is stopped.

    tool: a program that it needs, with which it is begun twice at most. goes_on: its next call
    takes up where this one was stopped, and it ends by itself within `--budget`, which is added.
    after: the stage whose results it needs.
    """

    name: str
    command: tuple[str, ...]
    least: float
    most: float
    tool: str = ""
    goes_on: bool = False
    after: str = ""


def add_half_hour(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.gpu` that belong to --full."""
    group = parser.add_argument_group("--full: the first half hour on a GPU")
    group.add_argument("--full", action="store_true", help="all stages, over several calls")
    group.add_argument("--seconds", type=float, default=570, help="of this call (default 570)")
    group.add_argument(
        "--again", nargs="+", default=[], metavar="STAGE", help="run these anew, or these parts"
    )
    group.add_argument("--data", type=Path, help="CIFAR-10, for the stage training")


def half_hour(options: argparse.Namespace) -> int:
    """The stages that are not done, as far as the seconds go; 1 if one of them failed."""
    begin = time.monotonic()
    machine = describe(torch.device("cpu" if options.dry_run else "cuda"))
    folder = options.out / f"full-{machine['name'].replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    ended: dict[str, Any] = json.loads(path.read_text())["stages"] if path.exists() else {}
    waiting = []
    for stage in stages(folder, options):
        former = ended.get(stage.name, {})
        state, attempts = former.get("state"), former.get("attempts", 0)
        if state in (DONE, FAILED, ABSENT, GAVE_UP) and stage.name not in options.again:
            print(f"{stage.name}: {state} before", flush=True)
            continue
        left = options.seconds - LEAVE - (time.monotonic() - begin)
        needed = ended.get(stage.after, {}).get("state") in (DONE, FAILED, GAVE_UP)
        needed = needed or not stage.after
        if left < stage.least or not needed:
            waiting.append(stage.name)
            continue
        found = run_stage(stage, folder, min(left, stage.most))
        if found["state"] == STOPPED and stage.tool and attempts + 1 >= ATTEMPTS:
            found["state"] = GAVE_UP
        ended[stage.name] = {**found, "attempts": attempts + 1}
        with atomic_write(path) as file:
            file.write(json.dumps({"machine": machine, "stages": ended}, indent=1).encode() + b"\n")
        print(f"{stage.name}: {ended[stage.name]['state']}", flush=True)
    stopped = [name for name, end in ended.items() if end["state"] == STOPPED]
    if waiting or stopped:
        print(f"for the next call: {', '.join([*stopped, *waiting])}")
    failed = [name for name, end in ended.items() if end["state"] in (FAILED, GAVE_UP)]
    for name in failed:
        print(f"FAILED {name}, {ended[name]['state']}: {ended[name]['output'][-300:]}")
    return 1 if failed else 0


def stages(folder: Path, options: argparse.Namespace) -> Iterator[Stage]:
    """All of them, in order; each is made when its turn comes, of what those before have found."""
    python = (sys.executable, "-m")
    gpu: tuple[str, ...] = (*python, "bench.gpu", "--resume", "--out", str(folder))
    tiles: tuple[str, ...] = (*python, "bench.tiles", "--json", str(folder / "tiles.json"))
    one_step: tuple[str, ...] = (*python, "bench.one_step")
    compiled = ("torch-compiled", "eager-compiled")
    if options.dry_run:
        gpu, tiles = (*gpu, "--dry-run"), (*tiles, "--dry-run", "--changes", "1")
        one_step = (*one_step, "--small", "1")

    def measured(name: str, least: float, most: float, *parts: str) -> Stage:
        anew = ("--again", *parts) if name in options.again else ()
        return Stage(name, (*gpu, "--parts", *parts, *anew), least, most, goes_on=True)

    yield measured("errors", 60, 400, "errors")
    for tool in SANITIZERS:
        watch = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        repeated = (*one_step, "--steps", "4")  # the fourth is a replay
        yield Stage(tool, (*watch, *repeated), 60, 240, tool="compute-sanitizer")
    yield measured("times", 60, 400, "times")
    yield measured("floor", 30, 240, "floor")
    yield measured("compiled", 90, 400, *compiled)
    if "tiles" in options.again:
        (folder / "tiles.json").unlink(missing_ok=True)
    yield Stage("tiles", tiles, 90, 400, goes_on=True)
    counters = counters_command(folder, one_step)
    yield Stage("counters", counters, 60, 240, tool="ncu", after="times")
    if options.data is not None:
        yield Stage("training", training_command(folder, options, python), 60, 1e9)


def counters_command(folder: Path, one_step: Sequence[str]) -> tuple[str, ...]:
    """ncu on the kernels that took longest in the stage times, at the shape where they did."""
    names, shape = slowest(folder)
    clocks = ("--clock-control", "none")  # the device's are left as they are
    watch = ("ncu", "--csv", *clocks, "--metrics", ",".join(COUNTERS), "--launch-count", "12")
    chosen = ("--kernel-name", f"regex:^({'|'.join(names)})$") if names else ()
    target = ("--shape", shape) if shape else ()
    return (*watch, *chosen, *one_step, "--steps", "2", *target)


def slowest(folder: Path, count: int = 3) -> tuple[list[str], str]:
    """The names of the kernels of most time, and the shape of the first of them."""
    rows = []
    for path in folder.glob("gpu-*.json"):
        for name, found in json.loads(path.read_text())["shapes"].items():
            rows += [(row["ms"], row["kernel"], name) for row in found.get("kernels") or []]
    rows.sort(reverse=True)
    names = list(dict.fromkeys(kernel for _, kernel, _ in rows))[:count]
    return names, rows[0][2] if rows and not rows[0][2].startswith("tiny") else ""


def training_command(
    folder: Path, options: argparse.Namespace, python: Sequence[str]
) -> tuple[str, ...]:
    """Meta-IADA and its controls on CIFAR-10 LT, which go on from where they were stopped."""
    if options.dry_run:
        return (*python, "iada", "--version")
    paper = (*python, "iada", "paper", "--table", "controls", "--row", "cifar10-100", "--seed", "0")
    return (*paper, "--data", str(options.data), "--device", "cuda", "--out", str(folder / "runs"))


def run_stage(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """How a stage ended, within so many seconds; its output is in a file of its name."""
    if stage.tool and shutil.which(stage.tool) is None:
        return {"state": ABSENT, "output": f"{stage.tool} is not installed", "seconds": 0.0}
    command = list(stage.command)
    if stage.goes_on:
        command += ["--budget", f"{max(1.0, seconds - LEAVE):.0f}"]
    print(f"{stage.name}: {' '.join(command)}", flush=True)
    begin, log = time.monotonic(), folder / f"{stage.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | ({} if stage.name == "errors" else plans_left(folder)),
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            code = None
        except BaseException:  # Ctrl-C: it would time beside the next call
            _stop(process)
            raise
    output = log.read_text(errors="replace")
    unfinished = code is None or (stage.goes_on and "\nleft out: " in output)
    state = STOPPED if unfinished else DONE if code == 0 else FAILED
    taken = time.monotonic() - begin
    return {"state": state, "code": code, "seconds": taken, "output": output[-TAIL:]}


def plans_left(folder: Path) -> dict[str, str]:
    """In the environment, what the stage errors left of plans and replays."""
    found = [json.loads(path.read_text()).get("plans") for path in folder.glob("gpu-*.json")]
    return {ALLOWED_BY: found[0]} if found and found[0] else {}


def _stop(process: subprocess.Popen) -> None:
    """The whole group: first by a word that lets a training write its checkpoint."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, word)
        try:
            process.wait(timeout=LEAVE / 2)
            return
        except subprocess.TimeoutExpired:
            continue
