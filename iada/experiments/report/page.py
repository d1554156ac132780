"""A page of finished runs that a person can open and send on: one file, figures inside."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from iada.experiments.metrics import OURS
from iada.experiments.report.corruptions import corruption_note, corruption_table
from iada.experiments.report.figures import draw_all
from iada.experiments.report.moved import moved_panels
from iada.experiments.report.style import Picture
from iada.experiments.report.tables import (
    PAIRED,
    Published,
    details_table,
    headline_metrics,
    headline_table,
    overview_table,
    published_of,
    runs_table,
    settings,
)
from iada.experiments.report.template import fill
from iada.experiments.report.variants import Record, Variant, by_experiment, tested_on, variants_of
from iada.utils.checks import argument_error
from iada.utils.files import write_text
from iada_kernels.environment import source_commit
from iada_kernels.version import __version__

NAMESPACE = r' xmlns(:\w+)?="[^"]*"'  # which a picture needs outside of a page alone
PAGE, RECORDS, FIGURES = "index.html", "records.json", "figures"


def write_page(
    records: Sequence[Record],
    folder: str | Path,
    published: Published | None = None,
    title: str = "IADA",
    command: str | None = None,
    introduction: Sequence[str] = (),
    reference: str = OURS,
) -> Path:
    """Write index.html, which needs no other file, records.json and figures/*.svg into `folder`.

    A section for each experiment: last and best epoch, mean ± standard deviation over seeds, the
    published figure beside them, every figure that the records have the numbers of, settings and
    runs. What a record lacks leaves a figure or a column out.

    Args:
        records: one a run, as `iada.experiments.report.variants` describes them.
        published: (experiment, "method_name" or "method") → {metric: percent}.
        title: of the page.
        command: that made the runs, shown at the end.
        introduction: paragraphs to begin with.
        reference: the method whose lead over each other is told, seed by seed.

    Returns the path of the page. Raises ValueError without records, or where an experiment has
    one method with the same settings and seed twice. Needs matplotlib.
    """
    if not records:
        raise argument_error("records", "at least one finished run", "none", "run something first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    variants = {name: variants_of(part) for name, part in by_experiment(records).items()}
    titles = {name: str(part[0].records[0].get("title") or name) for name, part in variants.items()}
    text = fill(
        "page.html",
        title=title,
        subtitle=made(records),
        introduction=introduction,
        overview=overview_table(titles, variants) if len(variants) > 1 else None,
        sections=[
            _section(name, titles[name], part, published or {}, folder / FIGURES, reference)
            for name, part in variants.items()
        ],
        command=command,
        versions=versions(),
        records=RECORDS,
    )
    write_text(folder / RECORDS, json.dumps(list(records)) + "\n")
    path = folder / PAGE
    write_text(path, text)
    return path


def figure(picture: Picture) -> str:
    """The picture as HTML, inside the page: the one of its two that the screen has room for."""
    label = f'<svg role="img" aria-label="{html.escape(picture.alt)}"'
    shown = [
        f'<div class="{kind}">{re.sub(NAMESPACE, "", drawn).replace("<svg", label, 1)}</div>'
        for kind, drawn in (("wide", picture.wide), ("narrow", picture.narrow))
    ]
    return (
        f"<figure>{''.join(shown)}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def versions() -> str:
    """Of this package and torch, with the commit of a checkout."""
    commit = source_commit()
    own = f"iada {__version__} ({commit})" if commit else f"iada {__version__}"
    return f"{own}, torch {torch.__version__}"


def made(records: Sequence[Record]) -> str:
    """When the last run ended, what versions and commits the runs are of, how long they took."""
    words = []
    ends = [record["finished"] for record in records if record.get("finished")]
    if ends:
        words.append(f"{datetime.fromisoformat(max(ends)):%d %B %Y, %H:%M} UTC")
    for name, values in (
        ("iada", [_version(record) for record in records]),
        ("commit", [record.get("commit") for record in records]),
    ):
        known = sorted({value for value in values if value})
        words += [f"{name} {', '.join(known)}"] * bool(known)
    seconds = [record["seconds"] for record in records if record.get("seconds") is not None]
    if seconds:
        number = f"{len(seconds)} of {len(records)}" if len(seconds) < len(records) else "all"
        words.append(f"{number} runs took {timedelta(seconds=round(sum(seconds)))}")
    return "; ".join(words)


def _version(record: Record) -> str | None:
    machine = record.get("machine")
    return machine.get("iada") if isinstance(machine, Mapping) else None


def _section(
    experiment: str,
    title: str,
    variants: Sequence[Variant],
    published: Published,
    figures: Path,
    reference: str,
) -> dict[str, Any]:
    """What the template shows of an experiment."""
    known: list[Mapping[str, float]] = [
        published_of(published, experiment, variant, variants) for variant in variants
    ]
    metrics = headline_metrics(variants, known)
    pictures = draw_all(experiment, title, variants, metrics[0] if metrics else "top1")
    figures.mkdir(exist_ok=True)
    for picture in pictures:
        write_text(figures / f"{picture.name}.svg", picture.wide)
    deviations = [d for v in variants for r in v.records for d in r.get("deviations", ())]
    differing, common = settings(variants)
    headline = headline_table(variants, metrics, known, reference) if metrics else None
    with_gaps = headline is not None and any(PAIRED in name for name in headline.head)
    return {
        "title": title,
        "headline": headline,
        "explanation": _explanation(variants, any(known), with_gaps),
        "deviations": list(dict.fromkeys(deviations)),
        "details": details_table(variants, metrics),
        "corruptions": corruption_table(variants, reference),
        "corruption_note": corruption_note(variants),
        "figures": map(figure, pictures),
        "moved": moved_panels(title, variants),
        "differing": differing,
        "common": common,
        "runs": runs_table(variants),
    }


def _explanation(variants: Sequence[Variant], with_published: bool, with_gaps: bool) -> str:
    seeds = {len(variant.records) for variant in variants}
    number = f"{seeds.pop()} " if len(seeds) == 1 else ""
    text = "One seed. " if number == "1 " else f"Mean ± standard deviation over {number}seeds. "
    if len(variants) > 1:
        text += "The best mean at the last epoch is in bold. "
    if {tested_on(r) for variant in variants for r in variant.records} == {"validation"}:
        text += "There is no test set: figures are on the validation set. "
    judges = {
        str(r.get("best_by") or "").split("_")[0] for variant in variants for r in variant.records
    }
    if judges == {"validation"}:
        text += "The best epoch is the one that is best on the validation set."
    elif judges == {"test"}:
        text += "The best epoch is picked with hindsight, by the accuracy on what it is tested on"
        text += ", as in several papers." if with_published else "."
    tests = sorted({r["tests"] for variant in variants for r in variant.records if r.get("tests")})
    if tests:
        text += f" It is one of {' or '.join(map(str, tests))} tests of a run"
        text += ": more of them make a higher best." if len(tests) > 1 else "."
    if with_published:
        text += " The published figures are the papers' own."
    if with_gaps:
        text += " Paired differences are of the same seeds, at the last epoch, ± what makes an "
        text += "interval of 95 %; each p is of its comparison alone, not of all at once."
    return text
