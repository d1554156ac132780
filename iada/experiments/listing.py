"""What the papers ran, what of it has been run, and the two side by side."""

from collections.abc import Iterable, Mapping, Sequence

from iada.experiments.metrics import METRICS, Spread, mean_std
from iada.experiments.recipe import DerivedEntry, MethodEntry, Recipe
from iada.experiments.records import Record, deviations_of
from iada.experiments.report.table import Cell, Table
from iada.experiments.report.tables import difference, gap_title, paired_columns, shown

PUBLISHED = "published"


def listing(recipes: Sequence[Recipe], records: Sequence[Record]) -> str:
    """Every recipe: its name, what it is, what data it needs, and what has been run of it."""
    lines = []
    source = ""
    for recipe in recipes:
        if recipe.source != source:
            source = recipe.source
            lines += ["", source, "=" * len(source)]
        lines += ["", f"{recipe.name}: {recipe.title}", f"  needs  {recipe.needs}"]
        runs = [record for record in records if record["experiment"] == recipe.name]
        if not runs:
            lines.append(f"  run    nothing yet ({len(recipe.methods)} methods)")
        for deviations in dict.fromkeys(map(deviations_of, runs)):
            chosen = [record for record in runs if deviations_of(record) == deviations]
            lines.append(f"  run    {deviations or 'as published'}")
            lines += [f"    {line}" for line in comparison(recipe, chosen).splitlines()]
    return "\n".join(lines).lstrip("\n")


def comparison(recipe: Recipe, records: Sequence[Record]) -> str:
    """A table: each method's figures, last and best epoch, with the published ones beside."""
    records = [*records, *derived_records(recipe, records)]
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    entries = _entries(recipe)
    quoted = [*(entry.published for entry in entries.values()), *recipe.published.values()]
    columns = []
    for metric in recipe.metrics:
        for epoch in ("last", "best"):
            columns.append((metric, epoch))
            if epoch == recipe.selection and any(metric in figures for figures in quoted):
                columns.append((metric, PUBLISHED))
    methods = {key: key for key in by_method}
    gaps = paired_columns(methods, by_method, recipe.metrics, recipe.reference)
    head = ["method", "seeds"]
    head += [PUBLISHED if e == PUBLISHED else f"{METRICS[metric]}, {e}" for metric, e in columns]
    rows = []
    for key, entry in entries.items():
        runs = by_method.get(key, [])
        if runs or entry.published:
            spreads = mean_std(runs)
            row = [Cell(entry.title), Cell(str(len(runs)) if runs else None)]
            row += [_figure(metric, epoch, spreads, entry.published) for metric, epoch in columns]
            row += [Cell(difference(metric, column.get(key))) for metric, column in gaps.items()]
            rows.append(row)
    for title, figures in recipe.published.items():
        row = [Cell(f"({title})"), Cell(None)]
        row += [_figure(metric, epoch, {}, figures) for metric, epoch in columns]
        rows.append(row + [Cell(None)] * len(gaps))
    if gaps:
        name = entries[recipe.reference].title
        head += [gap_title(name, metric, len(gaps)) for metric in gaps]
    return Table(head, rows).text()


def published_figures(recipes: Iterable[Recipe]) -> dict[tuple[str, str], Mapping[str, float]]:
    """(experiment, method's title) → metric → percent, for the report."""
    return {
        (recipe.name, entry.title): entry.published
        for recipe in recipes
        for entry in _entries(recipe).values()
        if entry.published
    }


def _entries(recipe: Recipe) -> dict[str, MethodEntry | DerivedEntry]:
    """The rows of its table that have figures of their own, by key."""
    entries: dict[str, MethodEntry | DerivedEntry] = {entry.key: entry for entry in recipe.methods}
    return entries | recipe.derived


def derived_records(recipe: Recipe, records: Iterable[Record]) -> list[Record]:
    """A record for each derived row of the recipe and each run that it is read off."""
    derived = []
    for record in records:
        for key, entry in recipe.derived.items():
            if record["method"] == entry.of:
                names = ("experiment", "title", "seed", "settings", "deviations", "class_counts")
                made = {name: record.get(name) for name in (*names, "best_epoch", "best_by")}
                made |= {"method": key, "method_name": entry.title}
                for epoch in ("last", "best"):
                    figures = record[epoch]
                    made[epoch] = {m: figures.get(source) for m, source in entry.metrics.items()}
                derived.append(made)
    return derived


def _figure(
    metric: str,
    epoch: str,
    spreads: Mapping[str, Mapping[str, Spread]],
    published: Mapping[str, float],
) -> Cell:
    """A method's figure at the last or best epoch, or the published one."""
    if epoch == PUBLISHED:
        return Cell(f"{published[metric]:.2f}" if metric in published else None)
    return Cell(shown(metric, spreads.get(epoch, {}).get(metric)))
