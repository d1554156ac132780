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
    epsilon_by_label,
    spectra,
)
from iada.experiments.report.style import Picture, SeriesStyle, series_styles
from iada.experiments.report.variants import (
    Record,
    Variant,
    Variants,
    differing_settings,
    is_noisy,
    setting,
    tested_on,
    with_styles,
)

TERMS = {
    "generalization": "G, generalization",
    "robustness": "R, robustness",
    "fairness": "F, fairness",
}
SWEPT = {"alpha": "α", "beta": "β"}
LEAST_SWEPT = 3  # values that make a sweep; two may be an ablation
RECOMMENDED = {"alpha": 0.5, "beta": 1.0}  # by the paper's section 5.6
SHOTS = ("many", "medium", "few")


def draw_all(experiment: str, title: str, variants: Variants, headline: str) -> list[Picture]:
    """Every figure that the records allow, in reading order.

    headline: the metric that the sensitivity is shown of.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", experiment.lower()).strip("-")
    main = main_variants(variants)
    pictures: list[Picture] = []

    def add(name: str, draw: Callable[..., Picture | None], *arguments: Any) -> None:
        picture = draw(f"{slug}-{name}", title, *arguments)
        if picture is not None:
            pictures.append(picture)

    add("classes", _class_accuracy, main)
    add("shots", _shots, main)
    add("groups", _groups, main)
    add("sensitivity", _sensitivity, variants, headline)
    add("confusion", _confusion, main)
    add("reliability", _reliability, main)
    add("corruptions", _by_severity, main)
    add("balance", _balance, main)
    add("curves", _curves, main)
    with_epsilon = [variant for variant in main if variant.has("epsilon")]
    untrained = [v for v in with_epsilon if setting(v.records[0], "perturbation") == "untrained"]
    for number, variant in enumerate(with_epsilon):
        ending = f"-{number}" if number else ""
        control = [] if variant in untrained else untrained[:1]
        add(f"adversarial-share{ending}", _adversarial_share, [variant, *control])
        add(f"clean-flipped{ending}", _clean_against_flipped, variant, control)
    add("terms", _terms, main)
    add("surrogate", _surrogate, main)
    add("spectrum", _spectra, main)
    return pictures


def main_variants(variants: Variants) -> list[Variant]:
    """All variants, but of a sweep over α and β the recommended values only, if they are in it."""
    swept = [variant for sweep in _sweeps(variants) for variant in sweep]
    wanted = RECOMMENDED.items()
    recommended = [
        v for v in swept if all(setting(v.records[0], key) == value for key, value in wanted)
    ]
    left_out = [variant for variant in swept if variant not in recommended] if recommended else []
    return with_styles([variant for variant in variants if variant not in left_out])


def _sweeps(variants: Variants) -> list[list[Variant]]:
    """The variants of each kind that differ in α and β alone, with three values of one of them."""
    sweeps = []
    for kind in dict.fromkeys(variant.kind for variant in variants):
        same_kind = [variant for variant in variants if variant.kind == kind]
        differing = differing_settings([r for variant in same_kind for r in variant.records])
        longest = max(len(_longest_line(same_kind, key)) for key in SWEPT)
        if set(differing) <= set(SWEPT) and longest >= LEAST_SWEPT:
            sweeps.append(same_kind)
    return sweeps


def _series(
    variants: Variants, rows_of: Callable[[Record], Sequence[float | None] | None]
) -> list[Series]:
    """One series a variant, over the records that `rows_of` has something of, in percent."""
    series = []
    for variant in variants:
        rows = [row for row in map(rows_of, variant.records) if row is not None]
        if rows and any(value is not None for row in rows for value in row):
            values = 100 * _padded(rows)
            series.append(Series(variant.label, variant.style, values))
    return series


def _padded(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """(rows, longest) float, NaN for None and for what a shorter row lacks."""
    values = np.full((len(rows), max(map(len, rows))), np.nan)
    for index, row in enumerate(rows):
        values[index, : len(row)] = [np.nan if value is None else value for value in row]
    return values


def _class_names(record: Record) -> list[str]:
    counts = record.get("class_counts") or record.get("confusion") or ()
    names = record.get("class_names") or [f"C{index + 1}" for index in range(len(counts))]
    return [str(name) for name in names]


def _by_size(record: Record, length: int) -> np.ndarray:
    """Class indices from most to fewest training images; as they are where these are unknown."""
    counts = [] if is_noisy(record) else record.get("class_counts")
    counts = counts or [0] * length
    return np.argsort(-np.asarray(counts), kind="stable")


def _class_accuracy(name: str, title: str, variants: Variants) -> Picture | None:
    def recall(record: Record) -> list[float | None] | None:
        rows = record.get("confusion")
        if not rows or len(rows) > MOST_BARS:
            return None
        return [row[index] / sum(row) if sum(row) else None for index, row in enumerate(rows)]

    part, names = tested_on(variants[0].records[0]), _class_names(variants[0].records[0])
    caption = f"{part.capitalize()} accuracy of each class at the last epoch, {title}."
    return bars(name, caption, names, _series(variants, recall))


def _shots(name: str, title: str, variants: Variants) -> Picture | None:
    def row(record: Record) -> list[float | None]:
        last = {} if is_noisy(record) else record.get("last") or {}
        return [last.get(shot) for shot in SHOTS]

    series = _series(variants, row)
    known = [i for i in range(3) if any(np.isfinite(one.values[:, i]).any() for one in series)]
    if len(known) < 2:  # one group of classes is all classes
        return None
    series = [Series(one.label, one.style, one.values[:, known]) for one in series]
    caption = f"Mean accuracy over classes with many, medium and few training images, {title}."
    return bars(name, caption, [METRICS[SHOTS[index]] for index in known], series)


def _groups(name: str, title: str, variants: Variants) -> Picture | None:
    tested = [record for variant in variants for record in variant.has("group_accuracy")]
    names = list(dict.fromkeys(group for record in tested for group in record["group_accuracy"]))

    def row(record: Record) -> list[float | None] | None:
        shares = record.get("group_accuracy")
        return [shares.get(group) for group in names] if shares else None

    part = tested_on(variants[0].records[0])
    caption = f"{part.capitalize()} accuracy of each group at the last epoch, {title}."
    return bars(name, caption, names, _series(variants, row))


def _adversarial_share(name: str, title: str, variants: Variants) -> Picture | None:
    """Of the first variant, beside that of its control if there is one."""
    rows = [r for r in variants[0].has("epsilon") if r["epsilon"].get("class_share")]
    if not rows:
        return None
    order = _by_size(rows[0], len(rows[0]["epsilon"]["class_share"]))
    series = _series(variants, lambda r: (r.get("epsilon") or {}).get("class_share"))
    names = _class_names(rows[0]) or [f"C{index + 1}" for index in range(len(order))]
    caption = (
        f"Share of adversarial samples (ε > 0) in each class late in training, "
        f"{variants[0].label}, {title}: the paper's Fig. 3."
    )
    if not is_noisy(rows[0]):
        caption += " Classes run from most to fewest training images."
    if len(variants) > 1:
        caption += f" Beside it {variants[1].label}, whose shares owe nothing to learning."
    ordered = [Series(one.label, one.style, one.values[:, order]) for one in series]
    ordered_names = [names[index] for index in order]
    return bars(name, caption, ordered_names, ordered, "adversarial (%)", height=2.6)


def _label_logs(variant: Variant) -> list[Mapping[str, Any]]:
    """What ε did by right and wrong label, of the runs that know which are wrong."""
    keys = ("share_flipped", "share_clean")
    logs = [record["epsilon"] for record in variant.has("epsilon")]
    return [log for log in logs if all(log.get(key) is not None for key in keys)]


def _clean_against_flipped(
    name: str, title: str, variant: Variant, control: Variants
) -> Picture | None:
    logs = _label_logs(variant)
    if not logs:
        return None
    shares = 100 * np.array([[log["share_clean"], log["share_flipped"]] for log in logs])
    keys = ("histogram_clean", "histogram_flipped")
    clean, flipped = (np.sum([log[key] for log in logs], axis=0) for key in keys)
    caption = (
        f"ε of samples with right and with flipped labels late in training, {variant.label}, "
        f"{title}: the paper's Fig. 4. ε < 0 is anti-adversarial."
    )
    known = [log["label_issues"] for log in logs if log.get("label_issues")]
    if known:
        figures = ("auroc", "precision", "base_rate")
        auroc, precision, chance = (np.mean([one[key] for one in known]) for key in figures)
        caption += (
            f" As a detector of wrong labels a sample's mean ε has an AUROC of {auroc:.3f}, and "
            f"{100 * precision:.1f} % of the samples ranked first are wrong ({100 * chance:.1f} % "
            "by chance)."
        )
    for other in control:
        if logs := _label_logs(other):
            each = [[log[key] for log in logs] for key in ("share_clean", "share_flipped")]
            right, wrong = (100 * np.mean(values) for values in each)
            caption += (
                f" Control: of {other.label}, {right:.1f} % of the visits with a right label are "
                f"adversarial and {wrong:.1f} % with a flipped one."
            )
    return epsilon_by_label(name, caption, shares, clean, flipped)


def _sensitivity(name: str, title: str, variants: Variants, headline: str) -> Picture | None:
    panels: dict[str, list[Series]] = {}
    positions: dict[str, list[float]] = {}
    for sweep in _sweeps(variants)[:1]:
        common = os.path.commonprefix([variant.name for variant in sweep])
        label = re.split("[,(]", common)[0].strip() or sweep[0].kind
        (style,) = series_styles([sweep[0].kind])
        for key, letter in SWEPT.items():
            line = _longest_line([v for v in sweep if headline in v.figures["last"]], key)
            if len(line) < 2:
                continue
            runs = [variant.records for variant in line.values()]
            scores = [[(r.get("last") or {}).get(headline) for r in records] for records in runs]
            panels[letter] = [Series(label, style, 100 * _padded(scores).T)]
            positions[letter] = list(line)
    caption = (
        f"{METRICS[headline]} at the last epoch over α and over β, the other as recommended or as "
        f"most runs have it, {title}: the paper's Fig. 6."
    )
    ylabel = f"{METRICS[headline].lower()} (%)"
    return curves(name, caption, panels, ylabel=ylabel, positions=positions)


def _longest_line(variants: Variants, key: str) -> dict[float, Variant]:
    """The variants along one setting, by its values, at the value of the other that most have."""
    (other,) = (name for name in SWEPT if name != key)
    lines: dict[Any, dict[float, Variant]] = {}
    for variant in variants:
        value = setting(variant.records[0], key)
        if isinstance(value, int | float):
            lines.setdefault(setting(variant.records[0], other), {})[float(value)] = variant
    if not lines:
        return {}
    best = max(lines, key=lambda at: (len(lines[at]), at == RECOMMENDED[other]))
    return dict(sorted(lines[best].items()))


def _confusion(name: str, title: str, variants: Variants) -> Picture | None:
    tested = {v.label: [np.array(r["confusion"]) for r in v.has("confusion")] for v in variants}
    matrices = {label: np.sum(counts, axis=0) for label, counts in tested.items() if counts}
    if not matrices:
        return None
    caption = f"Confusion matrices at the last epoch, summed over seeds, {title}."
    return confusions(name, caption, matrices, _class_names(variants[0].records[0]))


def _reliability(name: str, title: str, variants: Variants) -> Picture | None:
    series = _series(variants, lambda record: (record.get("reliability") or {}).get("accuracy"))
    if not series:
        return None
    bins = max(one.values.shape[1] for one in series)
    centres = [round(100 * (place + 0.5) / bins, 1) for place in range(bins)]
    ideal = Series("as sure as right", SeriesStyle("#000000", dashes=":"), np.array([centres]))
    axis = "confidence (%)"
    caption = (
        f"Reliability, {title}: accuracy of the {tested_on(variants[0].records[0])} samples whose "
        f"confidence lies in each of {bins} bins, at the last epoch. Below the dotted line a "
        "method is too sure."
    )
    panels, positions = {axis: [*series, ideal]}, {axis: centres}
    return curves(name, caption, panels, ylabel="accuracy (%)", positions=positions)


def _by_severity(name: str, title: str, variants: Variants) -> Picture | None:
    """A line a method: clean images, and then the mean over corruptions at each severity."""

    def row(record: Record) -> list[float] | None:
        found = record.get("corruptions")
        if not found:
            return None
        accuracy = [found["accuracy"][name] for name in found.get("in_mean", found["accuracy"])]
        return [found["clean"], *np.mean(accuracy, axis=0).tolist()]

    caption = (
        f"Accuracy on corrupted test images, the mean over corruptions at each severity, {title}. "
        "Severity 0 is the test set as it is."
    )
    return _accuracy_over(name, caption, "severity", _series(variants, row))


def _balance(name: str, title: str, variants: Variants) -> Picture | None:
    """A line a method: accuracy of the logits less τ log π."""

    def row(record: Record) -> list[float] | None:
        found = record.get("balance")
        return found["balanced"] if found else None

    caption = (
        f"Balance, {title}: accuracy (mean over classes) of the logits less τ log π, at the last "
        "epoch. A method that is best to the right of 0 still favours large classes, to the left "
        "small ones; heights tell what methods differ in beside that."
    )
    taus = next((r["balance"]["tau"] for v in variants for r in v.has("balance")), None)
    return _accuracy_over(name, caption, "τ", _series(variants, row), taus)


def _accuracy_over(
    name: str,
    caption: str,
    axis: str,
    series: Sequence[Series],
    places: Sequence[float] | None = None,
) -> Picture | None:
    """Lines at `places` of the axis, by default 0, 1, …; None without a line."""
    if not series:
        return None
    places = places or range(max(one.values.shape[1] for one in series))
    return curves(name, caption, {axis: series}, ylabel="accuracy (%)", positions={axis: places})


def _curves(name: str, title: str, variants: Variants) -> Picture | None:
    panels = _curve_panels(variants, {"accuracy": "balanced accuracy (%)", "loss": "training loss"})
    seeds = max(len(variant.records) for variant in variants)
    band = ": mean over seeds, band of one standard deviation" if seeds > 1 else ""
    return curves(name, f"Training, {title}{band}.", panels)


def _terms(name: str, title: str, variants: Variants) -> Picture | None:
    caption = (
        f"The regularisation terms of Table 1, mean over the samples looked at, {title}. To first "
        "order the loss is cross-entropy + α G + R + β F."
    )
    return curves(name, caption, _curve_panels(variants, TERMS))


def _curve_panels(variants: Variants, keys: Mapping[str, str]) -> dict[str, list[Series]]:
    """A panel for each of the curve's quantities that some record has, one series a variant."""
    panels: dict[str, list[Series]] = {}
    for key, label in keys.items():
        for variant in variants:
            rows = [[point.get(key) for point in r["curve"]] for r in variant.has("curve")]
            if any(value is not None for row in rows for value in row):
                values = _padded(rows) * (100 if "(%)" in label else 1)
                panels.setdefault(label, []).append(Series(variant.label, variant.style, values))
    return panels


def _surrogate(name: str, title: str, variants: Variants) -> Picture | None:
    measured = [record for variant in variants for record in variant.has("surrogate")]
    if not measured:
        return None
    size = 1 + max(max(record["surrogate"]["classes"]) for record in measured)

    def gap(record: Record) -> list[float | None] | None:
        surrogate = record.get("surrogate")
        if not surrogate:
            return None
        row: list[float | None] = [None] * size
        for index, value in zip(surrogate["classes"], surrogate["gap"], strict=True):
            row[index] = value / 100  # _series takes shares
        return row

    names = _class_names(measured[0]) or [f"C{index + 1}" for index in range(size)]
    caption = (
        "How far the surrogate (Eq. 5) lies above the loss it stands for (Eq. 2, sampled), for "
        f"each class, {title}."
    )
    return bars(name, caption, names, _series(variants, gap), "gap (nats)", top=None, height=2.6)


def _spectra(name: str, title: str, variants: Variants) -> Picture | None:
    panels, sentences, sized = {}, [], True
    for variant in variants:
        records = variant.has("spectrum")
        if not records:
            continue
        values = np.array(records[0]["spectrum"], dtype=float)
        panels[variant.label] = values[_by_size(records[0], len(values))]
        sized &= not is_noisy(records[0])
        ranks = effective_rank(torch.from_numpy(values))
        span = f"from {ranks.min():.1f} to {ranks.max():.1f}"
        sentences.append(f"{variant.label}: effective rank {span}.")
    if not panels:
        return None
    caption = (
        f"Eigenvalues of each class's covariance at the end of the first seed, {title}, down to "
        "what float32 can tell from 0. " + " ".join(sentences)
    )
    alt = f"Falling lines, one a class. {' '.join(sentences)}"
    order = "class, from most images to fewest" if sized else "class"
    return spectra(name, caption, panels, alt, order)
