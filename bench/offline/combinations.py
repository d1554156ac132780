"""Seeded random calls of every pass, and the launches of each, recorded and not run.

The subsets of gradients are taken in turn, so that 64 combinations have them all; sizes, dtypes,
the structure of Σ, what is absent, the reduction and the precision of products are drawn.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.offline.launches import (
    characteristics_pass,
    hypergradient_pass,
    loss_pass,
    meta,
    update_pass,
)
from iada_kernels.contract import HeadTangents, LossInputs, LossNeeds, LossOptions
from iada_kernels.triton.launch import Launch, recording

ROWS = (0, 1, 2, 7, 16, 33, 64, 127, 1024, 1025, 5000)
CLASSES = (1, 2, 3, 10, 16, 33, 100, 128, 129, 3000)
WIDTHS = (1, 2, 5, 16, 17, 40, 63, 64, 65, 128, 640, 2048)
FLOATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
NEEDS = [LossNeeds(*bits) for bits in itertools.product((False, True), repeat=6)]
TERMS = ("bias", "epsilon", "log_prior")


@dataclass(frozen=True)
class Combination:
    """One call. `terms` are those that are present; dtypes by name, as JSON holds them."""

    rows: int
    classes: int
    width: int
    features: str
    weight: str
    covariance: str
    structure: str  # "full", "diag" or "none"
    streams: bool
    terms: tuple[str, ...]
    needs: LossNeeds
    reduction: str
    matmul: str  # torch's float32 matmul precision
    other: str  # the pass that is called beside the loss
    neighbours: int

    @property
    def is_double(self) -> bool:
        """Whether sums are float64."""
        used = [self.features, self.weight]
        if self.structure != "none":
            used.append(self.covariance)
        return "float64" in used

    def described(self) -> dict[str, Any]:
        """As JSON holds it."""
        wanted = [name for name, is_needed in self.needs._asdict().items() if is_needed]
        return vars(self) | {"needs": wanted}


def combinations(count: int, seed: int = 0) -> list[Combination]:
    """The first `count` of the sequence of this seed."""
    draw = random.Random(seed)
    return [_combination(draw, NEEDS[index % len(NEEDS)]) for index in range(count)]


def _combination(draw: random.Random, needs: LossNeeds) -> Combination:
    structures = ("full", "diag") if needs.covariance else ("full", "full", "diag", "none")
    structure = draw.choice(structures)
    # A quarter of all has float64 somewhere, which makes all sums float64.
    dtypes = list(FLOATS) if draw.random() < 0.25 else ["float32", "bfloat16", "float16"]
    features, weight = draw.choice(dtypes), draw.choice(dtypes)
    # A full Σ of many classes at a large width would not fit into any memory.
    rows, classes, width = draw.choice(ROWS), draw.choice(CLASSES), draw.choice(WIDTHS)
    terms = tuple(t for t in TERMS if getattr(needs, t) or draw.random() < 0.5)
    return Combination(
        rows=rows,
        classes=classes,
        width=width,
        features=features,
        weight=weight,
        covariance="float64" if "float64" in dtypes and draw.random() < 0.5 else "float32",
        structure=structure,
        streams=structure != "none" and draw.random() < 0.5,
        terms=terms,
        needs=needs,
        reduction=draw.choice(("mean", "sum", "none")),
        matmul=draw.choice(("highest", "high")),
        other=draw.choice(("update", "hypergradient", "characteristics")),
        neighbours=draw.choice((0, 1, 5, 10)),
    )


def recorded_launches(combination: Combination, architecture: str) -> Iterator[tuple[str, Launch]]:
    """What the launchers would launch on `architecture`, each with the name of its pass."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(combination.matmul)
    try:
        for name, call in (("loss", _loss), (combination.other, _OTHERS[combination.other])):
            with recording(execute=False, architecture=architecture) as launches:
                call(combination)
            yield from ((name, each) for each in launches)
    finally:
        torch.set_float32_matmul_precision(before)


def _inputs(c: Combination) -> LossInputs:
    head, sigma = FLOATS[c.weight], None
    if c.structure != "none":
        square = (c.width,) if c.structure == "diag" else (c.width, c.width)
        sigma = meta(c.classes, *square, dtype=FLOATS[c.covariance])
    sizes = {"bias": c.classes, "epsilon": c.rows, "log_prior": c.classes}
    terms = {t: meta(sizes[t], dtype=head) if t in c.terms else None for t in TERMS}
    features = meta(c.rows, c.width, dtype=FLOATS[c.features])
    labels = meta(c.rows, dtype=torch.int64)
    weight = meta(c.classes, c.width, dtype=head)
    return LossInputs(features, weight, labels=labels, covariance=sigma, **terms)


def _loss(c: Combination) -> None:
    loss_pass(_inputs(c), LossOptions(reduction=c.reduction), c.needs, c.streams)


def _hypergradient(c: Combination) -> None:
    inputs = _inputs(c)
    dtype = inputs.compute_dtype
    tangents = HeadTangents(
        meta(c.rows, c.width, dtype=dtype) if c.streams else None,
        meta(c.classes, c.width, dtype=dtype),
        meta(c.classes, dtype=dtype) if "bias" in c.terms else None,
    )
    reduction = "sum" if c.reduction == "sum" else "mean"
    hypergradient_pass(inputs, LossOptions(reduction=reduction), tangents)


_OTHERS: dict[str, Callable[[Combination], None]] = {
    "update": lambda c: update_pass(_inputs(c)),
    "hypergradient": _hypergradient,
    "characteristics": lambda c: characteristics_pass(_inputs(c), FLOATS[c.weight], c.neighbours),
}
