"""Accuracy on corrupted test images: a table by corruption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iada.experiments.metrics import OURS, paired_by_seed, spread
from iada.experiments.report.table import Cell, Table
from iada.experiments.report.tables import PAIRED, difference, shown
from iada.experiments.report.variants import Variants

Found = Mapping[str, Any]  # of a record, as of `iada.experiments.diagnostics.corruption_accuracy`


def corruption_table(variants: Variants, reference: str = OURS) -> Table | None:
    """Corruptions by methods, each the mean over severities; None without any.

    Below the mean what the method `reference` is ahead there, seed by seed.
    """
    measured = {variant.label: _found(variant.records) for variant in variants}
    measured = {label: runs for label, runs in measured.items() if runs}
    names = list(
        dict.fromkeys(n for runs in measured.values() for r in runs for n in r["accuracy"])
    )
    if not names:
        return None
    rows = [
        [Cell("none"), *(_cell([run["clean"] for run in runs]) for runs in measured.values())],
        [
            Cell("mean"),
            *(_cell([run["mean"] for run in runs]) for runs in measured.values()),
        ],
    ]
    ours = [variant for variant in variants if variant.method == reference]
    if len(ours) == 1:
        means = {v.label: _mean_by_seed(v.records) for v in variants if v.label in measured}
        gaps = [
            None if label == ours[0].label else paired_by_seed(means.get(ours[0].label, {}), mean)
            for label, mean in means.items()
        ]
        if any(gap is not None and gap.seeds > 1 for gap in gaps):
            title = Cell(f"mean: {ours[0].label} {PAIRED}")
            rows.append([title, *(Cell(difference("top1", gap)) for gap in gaps)])
    for name in names:
        columns = [[run["accuracy"].get(name) for run in runs] for runs in measured.values()]
        cells = [_cell([np.mean(row) for row in column if row]) for column in columns]
        rows.append([Cell(name.replace("_", " ")), *cells])
    return Table(["corruption", *measured], rows)


def corruption_note(variants: Variants) -> str:
    """Below the table: what was measured, and whose corruptions these are."""
    runs = [run for variant in variants for run in _found(variant.records)]
    sources = {run["source"] for run in runs}
    text = "Top-1 accuracy (%) at the last epoch, each corruption's the mean of its severities."
    if "made" in sources:
        text += (
            " Corruptions made here, with amounts of this project: not the files of CIFAR-10-C, "
            "and not to be compared with figures on these."
        )
    if "published" in sources:
        text += (
            " Corruptions as published: CIFAR-10-C or CIFAR-100-C. The mean is over the fifteen of "
            "the benchmark, without the four that its authors keep for choosing settings."
        )
    return text


def _found(records: Sequence[Mapping[str, Any]]) -> list[Found]:
    return [record["corruptions"] for record in records if record.get("corruptions")]


def _mean_by_seed(records: Sequence[Mapping[str, Any]]) -> dict[int, float | None]:
    return {r.get("seed", 0): r["corruptions"]["mean"] for r in records if r.get("corruptions")}


def _cell(values: Sequence[float]) -> Cell:
    return Cell(shown("top1", spread([float(v) for v in values]), 1) if values else None)
