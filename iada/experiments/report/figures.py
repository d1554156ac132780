"""The figures of an experiment, as far as its records have what they show."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from iada.experiments.diagnostics.spectrum import effective_rank
from iada.experiments.metrics import METRICS
from iada.experiments.report.charts import (
    MOST_BARS,
    Series,
    bars,
    confusions,
    curves,
    spectra,
    strengths,
)
from iada.experiments.report.style import Picture, looks
from iada.experiments.report.variants import Arm, Record, differing_settings, setting, with_looks

TERMS = {
    "generalization": "G, generalization",
    "robustness": "R, robustness",
    "fairness": "F, fairness",
}
SWEPT = {"alpha": "α", "beta": "β"}
LEAST_SWEPT = 3  # values that make a sweep; two may be an ablation
RECOMMENDED = {"alpha": 0.5, "beta": 1.0}  # by the paper's section 5.6
SHOTS = ("many", "medium", "few")


def draw_all(experiment: str, title: str, arms: Sequence[Arm], headline: str) -> list[Picture]:
    """Every figure that the records allow, in reading order.

    headline: the metric that the sensitivity is shown of.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", experiment.lower()).strip("-")
    main = main_arms(arms)
    found: list[Picture] = []

    def add(name: str, draw: Callable[..., Picture | None], *arguments: Any) -> None:
        picture = draw(f"{slug}-{name}", title, *arguments)
        if picture is not None:
            found.append(picture)

    add("classes", _class_accuracy, main)
    add("shots", _shots, main)
    add("groups", _groups, main)
    add("sensitivity", _sensitivity, arms, headline)
    add("confusion", _confusion, main)
    add("curves", _curves, main)
    for number, arm in enumerate([arm for arm in main if arm.has("strengths")]):
        ending = f"-{number}" if number else ""
        add(f"adversarial-share{ending}", _adversarial_share, arm)
        add(f"clean-flipped{ending}", _clean_against_flipped, arm)
    add("terms", _terms, main)
    add("surrogate", _surrogate, main)
    add("spectrum", _spectra, main)
    return found


def main_arms(arms: Sequence[Arm]) -> list[Arm]:
    """All arms, but of a sweep over α and β the recommended values only, if they are in it."""
    swept = [arm for sweep in _sweeps(arms) for arm in sweep]
    recommended = [
        arm
        for arm in swept
        if all(setting(arm.records[0], key) == value for key, value in RECOMMENDED.items())
    ]
    left_out = [arm for arm in swept if arm not in recommended] if recommended else []
    return with_looks([arm for arm in arms if arm not in left_out])


def _sweeps(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms of each kind that differ in α and β alone, with three values of one of them."""
    found = []
    for kind in dict.fromkeys(arm.kind for arm in arms):
        own = [arm for arm in arms if arm.kind == kind]
        differing = differing_settings([record for arm in own for record in arm.records])
        longest = max(len(_longest_line(own, key)) for key in SWEPT)
        if set(differing) <= set(SWEPT) and longest >= LEAST_SWEPT:
            found.append(own)
    return found


def _series(
    arms: Sequence[Arm], rows_of: Callable[[Record], Sequence[float | None] | None]
) -> list[Series]:
    """One series an arm, over the records that `rows_of` has something of, in percent."""
    found = []
    for arm in arms:
        rows = [row for row in map(rows_of, arm.records) if row is not None]
        if rows and any(value is not None for row in rows for value in row):
            values = 100 * _padded(rows)
            found.append(Series(arm.label, arm.look, values))
    return found


def _padded(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """(rows, longest) float, NaN for None and for what a shorter row lacks."""
    values = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        values[place, : len(row)] = [np.nan if value is None else value for value in row]
    return values


def _class_names(record: Record) -> list[str]:
    counts = record.get("class_counts") or record.get("confusion") or ()
    names = record.get("class_names") or [f"C{place + 1}" for place in range(len(counts))]
    return [str(name) for name in names]


def _by_size(record: Record, length: int) -> np.ndarray:
    """Class indices from most to fewest training images; as they are where these are unknown."""
    counts = record.get("class_counts") or [0] * length
    return np.argsort(-np.asarray(counts), kind="stable")


def _class_accuracy(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    def recall(record: Record) -> list[float | None] | None:
        rows = record.get("confusion")
        if not rows or len(rows) > MOST_BARS:
            return None
        return [row[place] / sum(row) if sum(row) else None for place, row in enumerate(rows)]

    series = _series(arms, recall)
    if not series:
        return None
    caption = f"Test accuracy of each class at the last epoch, {title}."
    return bars(name, caption, _class_names(arms[0].records[0]), series)


def _shots(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    def row(record: Record) -> list[float | None]:
        return [(record.get("last") or {}).get(shot) for shot in SHOTS]

    series = _series(arms, row)
    known = [
        place for place in range(3) if any(np.isfinite(s.values[:, place]).any() for s in series)
    ]
    if len(known) < 2:  # one group of classes is all classes
        return None
    series = [Series(one.label, one.look, one.values[:, known]) for one in series]
    caption = f"Mean accuracy over classes with many, medium and few training images, {title}."
    return bars(name, caption, [METRICS[SHOTS[place]] for place in known], series)


def _groups(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    tested = [record for arm in arms for record in arm.has("group_accuracy")]
    names = list(dict.fromkeys(group for record in tested for group in record["group_accuracy"]))
    if not names:
        return None

    def row(record: Record) -> list[float | None] | None:
        shares = record.get("group_accuracy")
        return [shares.get(group) for group in names] if shares else None

    caption = f"Test accuracy of each group at the last epoch, {title}."
    return bars(name, caption, names, _series(arms, row))


def _adversarial_share(name: str, title: str, arm: Arm) -> Picture | None:
    rows = [r for r in arm.has("strengths") if r["strengths"].get("class_share")]
    if not rows:
        return None
    order = _by_size(rows[0], len(rows[0]["strengths"]["class_share"]))
    series = _series([arm], lambda r: (r.get("strengths") or {}).get("class_share"))
    if not series:
        return None
    names = _class_names(rows[0]) or [f"C{place + 1}" for place in range(len(order))]
    caption = (
        f"Share of adversarial samples (ε > 0) in each class late in training, {arm.label}, "
        f"{title}: the paper's Fig. 3. Classes run from most to fewest training images."
    )
    ordered = [Series(one.label, one.look, one.values[:, order]) for one in series]
    places = [names[place] for place in order]
    return bars(name, caption, places, ordered, "adversarial (%)", height=2.6)


def _clean_against_flipped(name: str, title: str, arm: Arm) -> Picture | None:
    found = [
        record["strengths"]
        for record in arm.has("strengths")
        if record["strengths"].get("share_flipped") is not None
        and record["strengths"].get("share_clean") is not None
    ]
    if not found:
        return None
    shares = 100 * np.array([[one["share_clean"], one["share_flipped"]] for one in found])
    clean, flipped = (
        np.sum([one[key] for one in found], axis=0)
        for key in ("histogram_clean", "histogram_flipped")
    )
    caption = (
        f"Strength ε of samples with right and with flipped labels late in training, {arm.label}, "
        f"{title}: the paper's Fig. 4. ε < 0 is anti-adversarial."
    )
    return strengths(name, caption, shares, clean, flipped)


def _sensitivity(name: str, title: str, arms: Sequence[Arm], headline: str) -> Picture | None:
    panels: dict[str, list[Series]] = {}
    places: dict[str, list[float]] = {}
    for sweep in _sweeps(arms)[:1]:
        common = os.path.commonprefix([arm.name for arm in sweep])
        label = re.split("[,(]", common)[0].strip() or sweep[0].kind
        (look,) = looks([sweep[0].kind])
        for key, letter in SWEPT.items():
            line = _longest_line([arm for arm in sweep if headline in arm.figures["last"]], key)
            if len(line) < 2:
                continue
            scores = [
                [(r.get("last") or {}).get(headline) for r in a.records] for a in line.values()
            ]
            panels[letter] = [Series(label, look, 100 * _padded(scores).T)]
            places[letter] = list(line)
    if not panels:
        return None
    caption = (
        f"{METRICS[headline]} at the last epoch over α and over β, the other as recommended or as "
        f"most runs have it, {title}: the paper's Fig. 6."
    )
    ylabel = f"{METRICS[headline].lower()} (%)"
    return curves(name, caption, panels, ylabel=ylabel, places=places)


def _longest_line(arms: Sequence[Arm], key: str) -> dict[float, Arm]:
    """The arms along one setting, by its values, at the value of the other that most have."""
    (other,) = (name for name in SWEPT if name != key)
    lines: dict[Any, dict[float, Arm]] = {}
    for arm in arms:
        value = setting(arm.records[0], key)
        if isinstance(value, int | float):
            lines.setdefault(setting(arm.records[0], other), {})[float(value)] = arm
    if not lines:
        return {}
    best = max(lines, key=lambda at: (len(lines[at]), at == RECOMMENDED[other]))
    return dict(sorted(lines[best].items()))


def _confusion(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    matrices = {
        arm.label: np.sum([np.array(r["confusion"]) for r in arm.has("confusion")], axis=0)
        for arm in arms
        if arm.has("confusion")
    }
    if not matrices:
        return None
    caption = f"Confusion matrices at the last epoch, summed over seeds, {title}."
    return confusions(name, caption, matrices, _class_names(arms[0].records[0]))


def _curves(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    panels = _curve_panels(arms, {"accuracy": "balanced accuracy (%)", "loss": "training loss"})
    if not panels:
        return None
    seeds = max(len(arm.records) for arm in arms)
    band = ": mean over seeds, band of one standard deviation" if seeds > 1 else ""
    return curves(name, f"Training, {title}{band}.", panels)


def _terms(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    panels = _curve_panels(arms, TERMS)
    if not panels:
        return None
    caption = (
        f"The regularisation terms of Table 1, mean over the samples looked at, {title}. To first "
        "order the loss is cross-entropy + α G + R + β F."
    )
    return curves(name, caption, panels)


def _curve_panels(arms: Sequence[Arm], keys: Mapping[str, str]) -> dict[str, list[Series]]:
    """A panel for each of the curve's quantities that some record has, one series an arm."""
    panels: dict[str, list[Series]] = {}
    for key, label in keys.items():
        for arm in arms:
            rows = [[point.get(key) for point in record["curve"]] for record in arm.has("curve")]
            if any(value is not None for row in rows for value in row):
                values = _padded(rows) * (100 if "(%)" in label else 1)
                panels.setdefault(label, []).append(Series(arm.label, arm.look, values))
    return panels


def _surrogate(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    measured = [record for arm in arms for record in arm.has("surrogate")]
    if not measured:
        return None
    size = 1 + max(max(record["surrogate"]["classes"]) for record in measured)

    def gap(record: Record) -> list[float | None] | None:
        found = record.get("surrogate")
        if not found:
            return None
        row: list[float | None] = [None] * size
        for place, value in zip(found["classes"], found["gap"], strict=True):
            row[place] = value / 100  # _series takes shares
        return row

    names = _class_names(measured[0]) or [f"C{place + 1}" for place in range(size)]
    caption = (
        "How far the surrogate (Eq. 5) lies above the loss it stands for (Eq. 2, sampled), for "
        f"each class, {title}."
    )
    return bars(name, caption, names, _series(arms, gap), "gap (nats)", top=None, height=2.6)


def _spectra(name: str, title: str, arms: Sequence[Arm]) -> Picture | None:
    panels, said = {}, []
    for arm in arms:
        records = arm.has("spectrum")
        if not records:
            continue
        values = np.array(records[0]["spectrum"], dtype=float)
        panels[arm.label] = values[_by_size(records[0], len(values))]
        ranks = effective_rank(torch.from_numpy(values))
        said.append(f"{arm.label}: effective rank from {ranks.min():.1f} to {ranks.max():.1f}.")
    if not panels:
        return None
    caption = (
        f"Eigenvalues of each class's covariance at the end of the first seed, {title}. "
        + " ".join(said)
    )
    return spectra(name, caption, panels, f"Falling lines, one a class. {' '.join(said)}")
