"""The demo's figures, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from iada.demo.scenarios import NUM_CLASSES, SCENARIOS
from iada.demo.settings import METHODS

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = dict(zip(METHODS, ("#999999", "#000000", "#56B4E9", "#E69F00", "#D55E00"), strict=True))
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

Records = Sequence[dict[str, Any]]


def draw_all(records: Records, folder: Path) -> dict[str, str]:
    """Write every figure that the records allow; file name → caption, in reading order."""
    drawn: dict[str, str] = {}
    with plt.rc_context(STYLE):
        for scenario in [s for s in SCENARIOS if _select(records, s)]:
            name = f"class-accuracy-{scenario}.png"
            _class_accuracy(_select(records, scenario), folder / name)
            drawn[name] = f"Test accuracy of each class, {SCENARIOS[scenario]}."
        meta = {s: _select(records, s, "meta-iada") for s in SCENARIOS}
        if meta["long-tail"]:
            _adversarial_share(meta["long-tail"], folder / "adversarial-share.png")
            drawn["adversarial-share.png"] = (
                "Share of adversarial samples (ε > 0) in each class under the long tail, last "
                "quarter of training, as in the paper's Fig. 3. Classes run from most to fewest "
                "images."
            )
        if meta["noise"]:
            _clean_against_flipped(meta["noise"], folder / "clean-flipped.png")
            drawn["clean-flipped.png"] = (
                "Strength ε of samples with right and with flipped labels, last quarter of "
                "training, as in the paper's Fig. 4: ε < 0 is anti-adversarial."
            )
        _curves(records, folder / "curves.png")
        drawn["curves.png"] = (
            "Balanced accuracy on the validation images after each epoch: mean over seeds, "
            "band of one standard deviation."
        )
    return drawn


def _select(records: Records, scenario: str, method: str | None = None) -> list[dict[str, Any]]:
    return [
        r
        for r in records
        if r["scenario"] == scenario and (method is None or r["method"] == method)
    ]


def _by_method(records: Records, key: str) -> dict[str, np.ndarray]:
    """(seeds, ...) of `key` for each method."""
    return {
        m: np.array([r[key] for r in records if r["method"] == m])
        for m in METHODS
        if any(r["method"] == m for r in records)
    }


def _class_accuracy(records: Records, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 3.2))
    groups = _by_method(records, "class_accuracy")
    width = 0.8 / len(groups)
    places = np.arange(NUM_CLASSES)
    for i, (method, values) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * width
        mean, error = 100 * values.mean(axis=0), 100 * _spread(values)
        axes.bar(
            places + offset,
            mean,
            width,
            yerr=error,
            error_kw={"lw": 0.7},
            color=COLOURS[method],
            label=METHODS[method],
        )
    axes.set(xticks=places, xlabel="digit", ylabel="accuracy (%)", ylim=(0, 105))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    _finish(figure, path)


def _adversarial_share(records: Records, path: Path) -> None:
    shares = 100 * np.array([r["strengths"]["class_share"] for r in records])
    figure, axes = plt.subplots(figsize=(8, 2.8))
    names = [f"C{c + 1}" for c in range(NUM_CLASSES)]
    error = _spread(shares)
    axes.bar(
        names, shares.mean(axis=0), yerr=error, color=COLOURS["meta-iada"], error_kw={"lw": 0.8}
    )
    axes.set(ylabel="adversarial (%)", ylim=(0, 105))
    _finish(figure, path)


def _clean_against_flipped(records: Records, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), width_ratios=(1, 2))
    shares = 100 * np.array(
        [[r["strengths"]["share_clean"], r["strengths"]["share_flipped"]] for r in records]
    )
    names, colours = ("right label", "flipped label"), ("#0072B2", "#D55E00")
    error = _spread(shares)
    left.bar(names, shares.mean(axis=0), yerr=error, color=colours, error_kw={"lw": 0.8})
    left.set(ylabel="adversarial (%)", ylim=(0, 105))
    for name, colour, key in zip(
        names, colours, ("histogram_clean", "histogram_flipped"), strict=True
    ):
        counts = np.sum([r["strengths"][key] for r in records], axis=0)
        edges = np.linspace(-1, 1, len(counts) + 1)
        right.stairs(
            100 * counts / counts.sum(), edges, fill=True, alpha=0.6, color=colour, label=name
        )
    right.axvline(0, color="black", lw=0.8)
    right.set(xlabel="strength ε", ylabel="visits (%)", xlim=(-1, 1))
    right.legend()
    _finish(figure, path)


def _curves(records: Records, path: Path) -> None:
    scenarios = [s for s in SCENARIOS if _select(records, s)]
    figure, panels = plt.subplots(
        1, len(scenarios), figsize=(4.2 * len(scenarios), 3.2), squeeze=False
    )
    for axes, scenario in zip(panels[0], scenarios, strict=True):
        _curve(axes, _select(records, scenario))
        axes.set(title=SCENARIOS[scenario], xlabel="epoch", ylabel="balanced accuracy (%)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=len(names), loc="outside lower center", fontsize=9)
    _finish(figure, path)


def _curve(axes: Axes, records: Records) -> None:
    for method, values in _by_method(records, "curve").items():
        epochs = np.arange(1, values.shape[1] + 1)
        mean, error = 100 * values.mean(axis=0), 100 * _spread(values)
        axes.plot(epochs, mean, color=COLOURS[method], label=METHODS[method], lw=1.5)
        axes.fill_between(epochs, mean - error, mean + error, color=COLOURS[method], alpha=0.15)


def _spread(values: np.ndarray) -> np.ndarray:
    if len(values) < 2:
        return np.zeros(values.shape[1:])
    return values.std(axis=0, ddof=1)


def _finish(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=144)
    plt.close(figure)
