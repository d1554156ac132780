"""Records in order: experiments, and in each the variants, whose runs differ in their seed only.

A record is one finished run in plain values, as JSON has them. Of its keys "experiment" and
"method" are a must; each figure and table asks for what it shows and goes without what is absent:

    experiment, title        "table2/cifar10-100", "CIFAR10-LT 100:1"
    method, method_name      "without-g", "Meta-IADA without G": what the page calls it
    deviations               ["12 of 200 epochs", …]: where the run is not as published
    seed, settings           settings: of the trainer, by name; "method" in it is what was trained
    class_names, class_counts
    last, best, best_epoch   of `iada.experiments.metrics.measure`, at the last and the best epoch
    best_by                  what that was chosen by: "validation_…" or "test_…" and a metric
    confusion                (C, C) counts at the last epoch, rows are true classes
    group_accuracy           by the group's name, at the last epoch
    curve                    [{"epoch", "loss", "accuracy", "generalization", "robustness",
                             "fairness"}, …], accuracy the mean over classes, a share
    epsilon                  {"class_share", "share_clean", "share_flipped", "histogram_clean",
                             "histogram_flipped"} as of `iada.experiments.epsilon_log.EpsilonLog`
    spectrum                 (C, A) eigenvalues, as of `iada.experiments.diagnostics.spectrum`
    surrogate                `iada.experiments.diagnostics.SurrogateGap.as_record()`
    corruptions              of `iada.experiments.diagnostics.corruption_accuracy`: "clean", "mean",
                             and "accuracy", by corruption and severity
    balance                  of `iada.experiments.diagnostics.balance`: accuracy by τ
    moved_features           of `iada.experiments.moved_record`: Fig. 5, its images in it
    seconds, machine
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from iada.experiments.metrics import Spread, mean_std
from iada.experiments.report.style import PREFERRED, SeriesStyle, series_styles
from iada.utils.checks import argument_error

Record = Mapping[str, Any]
INCIDENTAL = ("seed", "checkpoint_every")  # settings that do not make another variant


@dataclass(frozen=True)
class Variant:
    """A method as it was run, with one record a seed.

    kind: the method that was trained, which variants may share: the trainer's setting "method",
    else the record's. label: unlike that of any other variant.
    """

    method: str
    kind: str
    name: str
    label: str
    style: SeriesStyle
    records: Sequence[Record]

    @property
    def figures(self) -> dict[str, dict[str, Spread]]:
        """mean_std of the records."""
        return mean_std(self.records)

    def has(self, key: str) -> list[Record]:
        """The records with something under `key`."""
        return [record for record in self.records if record.get(key)]


Variants = Sequence[Variant]


def by_experiment(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each experiment, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["experiment"], []).append(record)
    return groups


def variants_of(records: Sequence[Record]) -> list[Variant]:
    """The variants of one experiment, baselines first.

    Runs of one method whose settings differ are variants of their own, labelled by what differs.
    Raises ValueError if a seed comes twice in a variant.
    """
    named: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = (record["method"], record.get("method_name") or record["method"])
        named.setdefault(key, []).append(record)
    order = list(PREFERRED)
    kinds = {key: str(setting(runs[0], "method") or key[0]) for key, runs in named.items()}
    rank = {
        (method, name): next((order.index(k) for k in (method, kind) if k in order), len(order))
        for (method, name), kind in kinds.items()
    }
    variants: list[Variant] = []
    for key, runs in sorted(named.items(), key=lambda item: rank[item[0]]):
        for label, part in _by_settings(key[1], runs):
            _check_seeds(label, part)
            part = sorted(part, key=lambda r: r.get("seed") or 0)
            variants.append(Variant(key[0], kinds[key], key[1], label, SeriesStyle(""), part))
    return with_styles(variants)


def with_styles(variants: Sequence[Variant]) -> list[Variant]:
    """The variants, styled so that all differ; the first of a kind has its colour if it is free."""
    styles = series_styles([v.method if v.method in PREFERRED else v.kind for v in variants])
    return [replace(v, style=style) for v, style in zip(variants, styles, strict=True)]


def differing_settings(records: Sequence[Record]) -> list[str]:
    """Names of the settings that are not the same in all records."""
    settings = [record.get("settings") or {} for record in records]
    names = dict.fromkeys(name for one in settings for name in one)
    return [
        name
        for name in names
        if name not in INCIDENTAL and len({json.dumps(one.get(name)) for one in settings}) > 1
    ]


def is_noisy(record: Record) -> bool:
    """Whether labels were made wrong: the training counts of its classes then say nothing."""
    scenario = (record.get("split") or {}).get("scenario")
    return scenario == "noise" or (record.get("epsilon") or {}).get("share_flipped") is not None


def tested_on(record: Record) -> str:
    """The part of the data that a run's figures are on: "test", or without one "validation"."""
    source = (record.get("split") or {}).get("from") or {}
    return "validation" if source.get("test") == "validation" else "test"


def setting(record: Record, name: str) -> Any:
    """One setting of a run, None where it is not recorded."""
    return (record.get("settings") or {}).get(name)


def _by_settings(name: str, runs: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    differing = differing_settings(runs)
    parts: dict[str, list[Record]] = {}
    for run in sorted(runs, key=lambda r: [_order(setting(r, key)) for key in differing]):
        values = [f"{key} {setting(run, key)}" for key in differing]
        label = f"{name} ({', '.join(values)})" if values else name
        parts.setdefault(label, []).append(run)
    return list(parts.items())


def _order(value: Any) -> tuple[float, str]:
    """Numbers by size, all else by name."""
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))


def _check_seeds(label: str, runs: Sequence[Record]) -> None:
    seeds = [run.get("seed") for run in runs]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if len(set(seeds)) < len(seeds):
        got = f"seed {twice} more than once for {label}"
        remedy = "leave out reruns"
        raise argument_error("records", "one record for each seed of a method", got, remedy)
