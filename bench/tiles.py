"""`python -m bench.tiles`: other tiles for the kernels of a training step, and a record to commit.

One tile at a time is changed: its sides halved or doubled, its warps, its stages. A change counts
by the time of the launches that it touches, against the tile that ships, at every shape where they
are launched; one that keeps registers in memory, does not compile or does not fit is out. The tile
of most time comes first, and the budget ends the sweep; the JSON has what was tried.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.accuracy import make_state
from bench.gpu.device import Stopwatch, describe
from bench.gpu.kernel_times import step_of
from bench.measuring.shapes import SHAPES, Shape, make_problem
from bench.measuring.timing import ratio
from bench.offline.launches import relaunch
from iada.utils.files import write_text
from iada_kernels.dispatch import INTERPRETED
from iada_kernels.environment import headline
from iada_kernels.triton.config import Configuration, Tile, use
from iada_kernels.triton.launch import Launch, current_configuration, recording

TINY = (Shape("tiny-full", 12, 3, 8, "full"), Shape("tiny-diag", 12, 4, 8, "diag"))
SIDES = (16, 32, 64, 128)
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
NOTABLE = 0.97  # a gain below 3 % is noise
Step = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("--budget", type=float, default=300, help="seconds (default 300)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME")
    parser.add_argument("--changes", type=int, default=24, help="of each tile, at most")
    parser.add_argument("--json", type=Path, help="write what was tried, and go on behind it")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted")
    options = parser.parse_args()
    if options.dry_run != INTERPRETED or not (INTERPRETED or torch.cuda.is_available()):
        expected = "a GPU, or --dry-run with TRITON_INTERPRET=1"
        print(f"bench.tiles: expected {expected}, got neither", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    watch = Stopwatch(device, rounds=1 if options.dry_run else 20)
    shapes = TINY if options.dry_run else [SHAPES[name] for name in options.shapes or WORTH_IT]
    steps = {shape.name: _step(shape, device) for shape in shapes}
    print(headline(describe(device), {"triton": "the launches with other tiles"}) + "\n")
    before: dict[str, Any] = {}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())["tiles"]
    sweep = Sweep(steps, current_configuration(device), watch, options.changes, before)
    complete = sweep.run(options.budget)
    found = sweep.found
    if options.json:
        about = {"machine": describe(device), "complete": complete, "unswept": sweep.unswept}
        written = {**about, "tiles": found}
        write_text(options.json, json.dumps(written, indent=1) + "\n")
    print(record_of(found))
    if sweep.unswept:
        print(f"not swept, as no launch here has its warps from them: {', '.join(sweep.unswept)}")
    if not complete:
        print("left out: changes that the budget had no time for")
    return 0


WORTH_IT = ("cifar100-r32", "cifar100-wrn", "imagenet-diag", "subpop-r50")


def _step(shape: Shape, device: torch.device) -> Step:
    problem = make_problem(shape).to(device)
    return step_of(shape, problem, make_state(shape, problem))


class Sweep:
    """found: by name of the tile what ships, its milliseconds by shape, and all that was tried."""

    def __init__(
        self,
        steps: dict[str, Step],
        base: Configuration,
        watch: Stopwatch,
        most: int,
        found: dict[str, Any],
    ) -> None:
        self.steps, self.base, self.watch, self.most = steps, base, watch, most
        self.found = found
        self.unswept: list[str] = []

    def run(self, budget: float) -> bool:
        """Whether nothing is left to try."""
        begin = time.monotonic()
        names = tiles_of(self.base)
        shipped = {name: self.launches(name, getattr(self.base, name)) for name in names}
        self.unswept = [name for name in names if not shipped[name]]
        ms = {name: self.spent(sides) for name, sides in shipped.items() if sides}
        for name in sorted(ms, key=lambda name: -sum(ms[name].values())):
            tile = getattr(self.base, name)
            entry = self.found.setdefault(name, {"ships": asdict(tile), "tried": []})
            entry["ms"] = ms[name]
            done = [tried["tile"] for tried in entry["tried"]]
            for other in itertools.islice(changes(tile), self.most):
                if asdict(other) in done:
                    continue
                if time.monotonic() - begin > budget:
                    return False
                entry["tried"].append(self.compared(name, other, shipped[name]))
        return True

    def compared(self, name: str, tile: Tile, shipped: dict[str, Step]) -> dict[str, Any]:
        """The time with this tile over that of the one that ships; None where it cannot be."""
        sides, ratios = self.launches(name, tile), {}
        for shape, call in sides.items():
            pair = {"ships": shipped[shape], "other": call}
            taken = self.watch.interleave(pair, host=False, budget=0.4)
            ratios[shape] = ratio(taken["other"], taken["ships"])
        mean = None
        if len(ratios) == len(shipped):
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        return {"tile": asdict(tile), "mean_ratio": mean, "ratio": ratios}

    def spent(self, sides: dict[str, Step]) -> dict[str, float]:
        return {shape: 1e3 * self.watch.median(call, 0.4) for shape, call in sides.items()}

    def launches(self, name: str, tile: Tile) -> dict[str, Step]:
        """What launches anew what a step launches with this tile, by shape; none that cannot be."""
        mark = replace(tile)  # of its own, by which its launches are known
        sides: dict[str, Step] = {}
        changed: dict[str, Any] = {name: mark}
        for shape, step in self.steps.items():
            try:
                with use(replace(self.base, **changed)), recording() as launches:
                    step()
                touched = [launch for launch in launches if launch.tile is mark]
                if touched and not any(
                    getattr(relaunch(launch), "n_spills", 0) for launch in touched
                ):
                    sides[shape] = partial(_all, touched)
            except Exception as error:  # does not compile, or asks for more than the device has
                print(f"{name} {tile} at {shape}: {type(error).__name__}: {error}"[:160])
        return sides


def _all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        relaunch(launch)


def tiles_of(configuration: Configuration) -> list[str]:
    """The names of the tiles of a configuration."""
    values = {field.name: getattr(configuration, field.name) for field in fields(configuration)}
    return [name for name, value in values.items() if isinstance(value, Tile)]


def changes(tile: Tile) -> Iterator[Tile]:
    """Other tiles, each once, in an order that is random and always the same."""
    depths = (0,) if tile.depth == 0 else SIDES
    axes = (SIDES, SIDES, depths, WARPS, STAGES)
    every = [Tile(*numbers) for numbers in itertools.product(*axes)]
    near = [other for other in every if other != tile and _distance(other, tile) <= 2]
    random.Random(0).shuffle(near)
    yield from sorted(near, key=lambda other: _distance(other, tile))


def _distance(one: Tile, other: Tile) -> float:
    """Doublings from one to the other, over all numbers."""
    pairs = zip(asdict(one).values(), asdict(other).values(), strict=True)
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


def record_of(found: dict[str, Any]) -> str:
    """The gains that are worth it, as the configuration's source has them."""
    lines = []
    for name, entry in found.items():
        sound = [tried for tried in entry["tried"] if tried["mean_ratio"] is not None]
        best = min(sound, key=lambda tried: tried["mean_ratio"], default=None)
        if best is not None and best["mean_ratio"] < NOTABLE:
            numbers = best["tile"]
            sides = ", ".join(str(numbers[axis]) for axis in ("rows", "columns", "depth"))
            lines.append(
                f"    {name}=Tile({sides}, warps={numbers['warps']}, stages={numbers['stages']}),"
                f"  # {best['mean_ratio']:.2f} of the time"
            )
    if not lines:
        return "no tile gains 3 % or more over those that ship"
    return "\n".join(["replace(", "    NVIDIA,", *lines, ")"])


if __name__ == "__main__":
    sys.exit(main())
