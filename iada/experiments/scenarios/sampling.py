"""Drawing samples evenly over classes, groups or clusters."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.labelled import Labelled, Parts
from iada.utils.checks import argument_error, check_count

Pieces = dict[str, tuple[str, Tensor] | None]  # of a split: part and rows, None for none


class Picked(NamedTuple):
    """Row numbers that were taken and those that are left, both ascending."""

    taken: Tensor
    left: Tensor


def part_of(parts: Parts, name: str) -> Labelled:
    """The part of this name, which the scenario needs."""
    if name not in parts:
        remedy = "add it, or cut one off with iada.experiments.scenarios.hold_out"
        raise argument_error("parts", f"a part {name!r}", ", ".join(parts) or "none", remedy)
    return parts[name]


def training_pieces(parts: Parts, rows: Tensor, meta: Tensor) -> Pieces:
    """These training rows and, if there are any, those of the meta set; the other parts whole."""
    others = [name for name in ("validation", "test") if name in parts]
    whole = {name: (name, torch.arange(len(parts[name]))) for name in others}
    return {"train": ("train", rows), "meta": ("train", meta) if len(meta) else None, **whole}


def rows_by_key(keys: Tensor, count: int, rng: np.random.Generator) -> list[Tensor]:
    """The rows of each key in [0, count), in random order."""
    order = torch.from_numpy(rng.permutation(len(keys)))
    return [order[keys[order] == key] for key in range(count)]


def pick_evenly(
    keys: Tensor,
    names: Sequence[str],
    each: int,
    rng: np.random.Generator,
    kind: str,
    setting: str,
    spare: int = 0,
) -> Picked:
    """`each` rows of every key; at least `spare` rows of every key are left.

    keys: (N) int64 in [0, len(names)). For the message, kind: what a key is ("class"), and
    setting: which one asks for so many.
    """
    check_count(f"samples of each {kind}", each)
    by_key = rows_by_key(keys, len(names), rng)
    short = [key for key, rows in enumerate(by_key) if len(rows) < each + spare]
    if short:
        most = min(len(rows) for rows in by_key) - spare
        stay = f", {spare} to stay" if spare else ""
        expected = f"at least {each + spare} samples: {each} to take ({setting}){stay}"
        got = f"{len(by_key[short[0]])} ({len(short)} of {len(names)} have too few)"
        remedy = (
            f"ask for {most} at most in {setting}" if most > 0 else "take them from another part"
        )
        raise argument_error(f"{kind} {names[short[0]]!r}", expected, got, remedy)
    return picked(torch.cat([rows[:each] for rows in by_key]), len(keys))


def picked(taken: Tensor, count: int) -> Picked:
    """These rows and the others of range(count)."""
    left = torch.ones(count, dtype=torch.bool)
    left[taken] = False
    return Picked(taken.sort().values, left.nonzero().flatten())
