"""What the tables of a report hold; `Table` shows them."""

import itertools
from collections.abc import Mapping, Sequence

from iada.experiments.metrics import LOWER_IS_BETTER, METRICS, OURS, Paired, Spread, paired
from iada.experiments.report.table import Cell, Table
from iada.experiments.report.variants import Record, Variant, Variants, differing_settings

Figures = Mapping[str, float]  # metric → percent
Published = Mapping[tuple[str, str], Figures]  # by experiment, and method or method's name
SHOWN = ("processor", "capability", "device", "torch", "backend")  # of a machine
IN_NATS = ("nll",)
PAIRED = "less this, paired"  # in the head of a column of differences


def headline_metrics(variants: Variants, published: Sequence[Figures]) -> list[str]:
    """The metrics to show first: those published, else the groups' or top-1, else any."""
    chosen = [m for m in METRICS if any(m in figures for figures in published)]
    measured = {m for v in variants for figures in v.figures.values() for m in figures}
    if not chosen:
        preferred = ("average", "worst_group") if "worst_group" in measured else ("top1",)
        chosen = [m for m in preferred if m in measured]
    return chosen or [m for m in METRICS if m in measured][:1]


def published_of(
    published: Published, experiment: str, variant: Variant, variants: Variants
) -> Figures:
    """The published figures of a variant: under its name, or under its method where no other
    variant has that. Empty if there are none."""
    if (experiment, variant.name) in published:
        return published[experiment, variant.name]
    alone = sum(other.method == variant.method for other in variants) == 1
    return published.get((experiment, variant.method), {}) if alone else {}


def headline_table(
    variants: Variants,
    metrics: Sequence[str],
    published: Sequence[Figures],
    reference: str = OURS,
) -> Table:
    """Last and best epoch side by side and the published figure, for each of `metrics`.

    The number of seeds has a column where it is not the same for all. For each metric a column has
    what the method `reference` is ahead of each other, where two have two seeds in common or more.
    """
    methods = {variant.label: variant.method for variant in variants}
    runs = {variant.label: variant.records for variant in variants}
    gaps = paired_columns(methods, runs, metrics, reference)
    name = next((v.label for v in variants if v.method == reference), reference)
    with_published = any(published)
    with_seeds = len({len(v.records) for v in variants}) > 1
    head = ["method"]
    for metric in metrics:
        unit = "" if metric in IN_NATS else " (%)"
        head += [f"{METRICS[metric]}{unit}, last epoch", "best epoch"]
        head += ["published"] * with_published
    rows = []
    best = {metric: _best(variants, metric) for metric in metrics}
    for variant, known in zip(variants, published, strict=True):
        row = [Cell(variant.label)]
        for metric in metrics:
            last, peak = (variant.figures[epoch].get(metric) for epoch in ("last", "best"))
            bold = variant.label in best[metric]
            row += [Cell(shown(metric, last), bold), Cell(shown(metric, peak))]
            if with_published:
                row.append(Cell(f"{known[metric]:.2f}" if metric in known else None))
        if with_seeds:
            row.append(Cell(str(len(variant.records))))
        row += [Cell(difference(m, column.get(variant.label))) for m, column in gaps.items()]
        rows.append(row)
    head += ["seeds"] * with_seeds + [gap_title(name, metric, len(gaps)) for metric in gaps]
    return Table(head, rows)


def details_table(variants: Variants, metrics: Sequence[str]) -> Table | None:
    """Every metric that some variant has: the last epoch, below it the best.

    None if all of them are among `metrics`, which are shown already.
    """
    known = [m for m in METRICS if any(m in v.figures["last"] for v in variants)]
    if set(known) <= set(metrics):
        return None
    rows = []
    for variant in variants:
        last, best = variant.figures["last"], variant.figures["best"]
        cells = (Cell(shown(m, last.get(m)), small=shown(m, best.get(m))) for m in known)
        rows.append([Cell(variant.label), *cells])
    return Table(["method", *(METRICS[m] for m in known)], rows)


def overview_table(
    titles: Mapping[str, str], variants: Mapping[str, Variants], decimals: int = 2
) -> Table:
    """Methods by experiments: each experiment's first headline metric at the last epoch."""
    labels = dict.fromkeys(v.label for part in variants.values() for v in part)
    columns = []
    for part in variants.values():
        metrics = headline_metrics(part, [])[:1]
        best = {label for metric in metrics for label in _best(part, metric, decimals)}
        column = {}
        for metric, variant in itertools.product(metrics, part):
            text = shown(metric, variant.figures["last"].get(metric), decimals)
            column[variant.label] = Cell(text, variant.label in best)
        columns.append(column)
    rows = [[Cell(name), *(part.get(name, Cell(None)) for part in columns)] for name in labels]
    return Table(["method", *(titles[name] for name in variants)], rows)


def runs_table(variants: Variants) -> Table:
    """One row a run: its time, its best epoch and its machine."""
    rows = []
    for variant in variants:
        for record in variant.records:
            seconds, epoch = record.get("seconds"), record.get("best_epoch")
            best = None if epoch is None else str(epoch)
            minutes = None if seconds is None else f"{seconds / 60:.1f}"
            seed = str(record.get("seed", 0))
            texts = (variant.label, seed, best, minutes, _machine(record))
            rows.append([Cell(text) for text in texts])
    return Table(["method", "seed", "best epoch", "minutes", "machine"], rows)


def settings(variants: Variants) -> tuple[Table, str]:
    """The settings that differ between variants, and in words those that do not."""
    runs = [record for variant in variants for record in variant.records]
    differing = [name for name in differing_settings(runs) if name != "method"]
    rows = []
    for variant in variants:
        values = variant.records[0].get("settings") or {}
        cells = (Cell(str(values[name]) if name in values else None) for name in differing)
        rows.append([Cell(variant.label), *cells])
    every = {name: value for run in runs for name, value in (run.get("settings") or {}).items()}
    told = (*differing, "method", "seed")
    common = ", ".join(f"{name} {value}" for name, value in every.items() if name not in told)
    return Table(["method", *differing], rows), common


def shown(metric: str, value: Spread | None, decimals: int = 2) -> str | None:
    """Mean ± standard deviation, where there is one, in percent, NLL in nats; None without."""
    if value is None:
        return None
    scale = unit_of(metric)
    mean = f"{scale * value.mean:.{decimals}f}"
    return mean if value.std is None else f"{mean} ± {scale * value.std:.{decimals}f}"


def unit_of(metric: str) -> float:
    """What a metric is multiplied by where it is shown."""
    return 1.0 if metric in IN_NATS else 100.0


def difference(metric: str, gap: Paired | None) -> str | None:
    """Mean of a paired difference ± what makes an interval of 95 %, and p of Student's test."""
    if gap is None:
        return None
    scale, decimals = unit_of(metric), 1 if unit_of(metric) > 1 else 2
    text = f"{round(scale * gap.mean, 9):+.{decimals}f}"  # 4.95 stays 4.95 whatever it is made of
    if gap.margin is not None:
        text += f" ± {scale * gap.margin:.{decimals}f}"
    if gap.p is not None:
        text += f" (p {gap.p:.3f})" if gap.p >= 0.001 else " (p < 0.001)"
    return text


def paired_columns(
    methods: Mapping[str, str],
    records: Mapping[str, Sequence[Record]],
    metrics: Sequence[str],
    reference: str = OURS,
) -> dict[str, dict[str, Paired]]:
    """By metric what the method `reference` is ahead of each other row, seed by seed.

    methods, records: of each row, by its name. Without a metric where no row has two seeds in
    common with it, and empty where it is not there, or more than once.
    """
    ours = [name for name, method in methods.items() if method == reference]
    if len(ours) != 1:
        return {}
    columns = {}
    for metric in metrics:
        found = {n: paired(records[ours[0]], r, metric) for n, r in records.items() if n != ours[0]}
        columns[metric] = {n: gap for n, gap in found.items() if gap is not None and gap.seeds > 1}
    return {metric: column for metric, column in columns.items() if column}


def gap_title(name: str, metric: str, columns: int) -> str:
    """The head of such a column of several; name: whose lead it is."""
    return f"{name} {PAIRED}" + (f": {METRICS[metric]}" if columns > 1 else "")


def _best(variants: Variants, metric: str, decimals: int = 2) -> set[str]:
    """The labels of the variants that are best in `metric` at the last epoch, as far as is shown.

    None of fewer than two that can be compared.
    """
    known = {
        variant.label: round(unit_of(metric) * variant.figures["last"][metric].mean, decimals)
        for variant in variants
        if metric in variant.figures["last"]
    }
    if len(known) < 2:
        return set()
    best = (min if metric in LOWER_IS_BETTER else max)(known.values())
    return {label for label, value in known.items() if value == best}


def _machine(record: Record) -> str | None:
    machine = record.get("machine")
    if isinstance(machine, Mapping):
        return ", ".join(str(machine[name]) for name in SHOWN if name in machine) or None
    return None if machine is None else str(machine)
