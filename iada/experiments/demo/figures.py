"""The demo's figures."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from iada.experiments.demo.scenarios import NUM_CLASSES, SCENARIOS
from iada.experiments.demo.settings import METHODS
from iada.experiments.report.charts import Series, bars, curves, strengths
from iada.experiments.report.style import PREFERRED, Look, Picture

Records = Sequence[dict[str, Any]]
LOOKS = {method: Look(PREFERRED[method]) for method in METHODS}


def draw_all(records: Records) -> list[Picture]:
    """Every figure that the records allow, in reading order."""
    drawn = []
    for scenario in [s for s in SCENARIOS if _select(records, s)]:
        drawn.append(
            bars(
                f"class-accuracy-{scenario}",
                f"Test accuracy of each class, {SCENARIOS[scenario]}.",
                [str(digit) for digit in range(NUM_CLASSES)],
                _series(_select(records, scenario), lambda r: r["class_accuracy"]),
                xlabel="digit",
            )
        )
    meta = {s: _select(records, s, "meta-iada") for s in SCENARIOS}
    if meta["long-tail"]:
        drawn.append(
            bars(
                "adversarial-share",
                "Share of adversarial samples (ε > 0) in each class under the long tail, last "
                "quarter of training, as in the paper's Fig. 3. Classes run from most to fewest "
                "images.",
                [f"C{c + 1}" for c in range(NUM_CLASSES)],
                _series(meta["long-tail"], lambda r: r["strengths"]["class_share"]),
                "adversarial (%)",
            )
        )
    if meta["noise"]:
        found = [record["strengths"] for record in meta["noise"]]
        drawn.append(
            strengths(
                "clean-flipped",
                "Strength ε of samples with right and with flipped labels, last quarter of "
                "training, as in the paper's Fig. 4: ε < 0 is anti-adversarial.",
                100 * np.array([[one["share_clean"], one["share_flipped"]] for one in found]),
                np.sum([one["histogram_clean"] for one in found], axis=0),
                np.sum([one["histogram_flipped"] for one in found], axis=0),
            )
        )
    panels = {
        SCENARIOS[s]: _series(_select(records, s), lambda r: r["curve"])
        for s in SCENARIOS
        if _select(records, s)
    }
    caption = (
        "Balanced accuracy on the validation images after each epoch: mean over seeds, "
        "band of one standard deviation."
    )
    drawn.append(curves("curves", caption, panels, ylabel="balanced accuracy (%)"))
    return drawn


def _select(records: Records, scenario: str, method: str | None = None) -> list[dict[str, Any]]:
    return [
        r
        for r in records
        if r["scenario"] == scenario and (method is None or r["method"] == method)
    ]


def _series(records: Records, row_of: Callable[[dict[str, Any]], Sequence[float]]) -> list[Series]:
    """(seeds, ...) in percent for each method."""
    return [
        Series(
            METHODS[m], LOOKS[m], 100 * np.array([row_of(r) for r in records if r["method"] == m])
        )
        for m in METHODS
        if any(r["method"] == m for r in records)
    ]
