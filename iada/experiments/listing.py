"""What the papers ran, what of it has been run, and the two side by side."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iada.experiments.metrics import METRICS, mean_std
from iada.experiments.recipe import Recipe
from iada.experiments.run import RECORD
from iada.utils.checks import complain

Record = dict[str, Any]


def read_records(folders: Iterable[Path]) -> list[Record]:
    """All records below these folders, each run once; ValueError for a damaged one.

    A file is one record, or a list of them.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for folder in folders:
        files = [folder] if folder.is_file() else sorted(folder.rglob(RECORD))
        for path in files:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                remedy = "delete it, or mend it"
                raise complain(str(path), "a run's record", f"{error}", remedy) from error
            for record in content if isinstance(content, list) else [content]:
                key = (record["experiment"], record["method"], record["seed"])
                found.setdefault((*key, _departures(record)), record)
    return list(found.values())


def listing(recipes: Sequence[Recipe], records: Sequence[Record]) -> str:
    """Every recipe: its name, what it is, what data it needs, and what has been run of it."""
    lines = []
    source = ""
    for recipe in recipes:
        if recipe.source != source:
            source = recipe.source
            lines += ["", source, "=" * len(source)]
        lines += ["", f"{recipe.name}: {recipe.title}", f"  needs  {recipe.needs}"]
        own = [record for record in records if record["experiment"] == recipe.name]
        if not own:
            lines.append(f"  run    nothing yet ({len(recipe.contestants)} methods)")
        for departures in dict.fromkeys(map(_departures, own)):
            chosen = [record for record in own if _departures(record) == departures]
            lines.append(f"  run    {departures or 'as published'}")
            lines += [f"    {line}" for line in comparison(recipe, chosen).splitlines()]
    return "\n".join(lines).lstrip("\n")


def comparison(recipe: Recipe, records: Sequence[Record]) -> str:
    """A table: each method's figures, last and best epoch, with the published ones beside."""
    shown = [(metric, epoch) for metric in recipe.metrics for epoch in ("last", "best")]
    head = ["method", "seeds"]
    for metric, epoch in shown:
        head.append(f"{METRICS[metric]}, {epoch}")
        if epoch == recipe.selection:
            head.append("published")
    rows = [head]
    for contestant in recipe.contestants:
        own = [record for record in records if record["method"] == contestant.key]
        if not own and not contestant.published:
            continue
        spreads = mean_std(own)
        row = [contestant.title, str(len(own)) if own else "–"]
        for metric, epoch in shown:
            row.append(_shown(spreads[epoch].get(metric)))
            if epoch == recipe.selection:
                row.append(_percent(contestant.published.get(metric)))
        rows.append(row)
    for title, figures in recipe.published.items():
        row = [f"({title})", "–"]
        for metric, epoch in shown:
            row.append("–")
            if epoch == recipe.selection:
                row.append(_percent(figures.get(metric)))
        rows.append(row)
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def published_figures(recipes: Iterable[Recipe]) -> dict[tuple[str, str], Mapping[str, float]]:
    """(experiment, method's title) → metric → percent, for the report."""
    return {
        (recipe.name, contestant.title): contestant.published
        for recipe in recipes
        for contestant in recipe.contestants
        if contestant.published
    }


def _departures(record: Record) -> str:
    """What a run did other than the recipe says."""
    return ", ".join(record.get("departures") or ())


def _shown(spread: Any) -> str:
    if spread is None:
        return "–"
    std = "" if spread.std is None else f" ± {100 * spread.std:.2f}"
    return f"{100 * spread.mean:.2f}{std}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
