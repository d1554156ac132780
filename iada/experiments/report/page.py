"""A page of finished runs that a person can open and send on: one file, figures inside."""

import base64
import html
import json
import string
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch

from iada.experiments.report.figures import draw_all
from iada.experiments.report.style import Picture
from iada.experiments.report.tables import (
    Published,
    details_table,
    headline_metrics,
    headline_table,
    overview_table,
    published_of,
    runs_table,
    settings_table,
)
from iada.experiments.report.variants import Arm, Record, arms_of, by_experiment
from iada.utils.checks import complain
from iada_kernels.version import __version__

PAGE, RECORDS = "index.html", "records.json"


def write_page(
    records: Sequence[Record],
    folder: str | Path,
    published: Published | None = None,
    title: str = "IADA",
    command: str | None = None,
) -> Path:
    """Write index.html, which needs no other file, and records.json into `folder`.

    A section for each experiment: last and best epoch, mean ± standard deviation over seeds, the
    published figure beside them, every figure that the records have the numbers of, settings and
    runs. What a record lacks leaves a figure or a column out.

    Args:
        records: one a run, as `iada.experiments.report.variants` describes them.
        published: (experiment, "method_name" or "method") → {metric: percent}.
        title: of the page.
        command: that made the runs, shown at the end.

    Returns the path of the page. Raises ValueError without records, or where an experiment has
    one method with the same settings and seed twice. Needs matplotlib.
    """
    if not records:
        raise complain("records", "at least one finished run", "none", "run something first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arms = {name: arms_of(part) for name, part in by_experiment(records).items()}
    titles = {name: str(part[0].records[0].get("title") or name) for name, part in arms.items()}
    content = []
    if len(arms) > 1:
        content.append(f"<h2>Overview</h2>{overview_table(titles, arms)}")
        content.append("<p>In percent, at the last epoch; the best of each column in bold.</p>")
    for name, part in arms.items():
        content.append(_section(name, titles[name], part, published or {}))
    text = render(title, "\n".join(content), _footer(command))
    (folder / RECORDS).write_text(json.dumps(list(records)) + "\n", encoding="utf-8")
    path = folder / PAGE
    path.write_text(text, encoding="utf-8")
    return path


def render(title: str, content: str, footer: str) -> str:
    """The page around `content` and `footer`, which are HTML."""
    template = (
        resources.files("iada.experiments.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return string.Template(template).substitute(
        title=html.escape(title), content=content, footer=footer
    )


def figure(picture: Picture, folder: Path | None = None) -> str:
    """The picture as HTML: inside the page, or as files in `folder` beside it."""
    sources = []
    for image, ending in ((picture.narrow, "-narrow.png"), (picture.wide, ".png")):
        width, height = struct.unpack(">II", image[16:24])
        if folder is None:
            place = "data:image/png;base64," + base64.b64encode(image).decode()
        else:
            place = picture.name + ending
            (folder / place).write_bytes(image)
        sources.append((place, f'width="{width}" height="{height}"'))
    (narrow, narrow_size), (wide, wide_size) = sources
    return (
        f'<figure><picture><source media="(max-width: 40rem)" srcset="{narrow}" {narrow_size}>'
        f'<img src="{wide}" {wide_size} alt="{html.escape(picture.alt)}"></picture>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def versions() -> str:
    """Of this package and torch."""
    return f"iada {__version__}, torch {torch.__version__}"


def _section(experiment: str, title: str, arms: Sequence[Arm], published: Published) -> str:
    known: list[Mapping[str, float]] = [
        published_of(published, experiment, arm, arms) for arm in arms
    ]
    metrics = headline_metrics(arms, known)
    parts = [f"<h2>{html.escape(title)}</h2>"]
    if metrics:
        parts.append(headline_table(arms, metrics, known))
        parts.append(f"<p>{_explanation(arms, any(known))}</p>")
        parts.append(details_table(arms, metrics))
    parts += [
        figure(p) for p in draw_all(experiment, title, arms, metrics[0] if metrics else "top1")
    ]
    parts.append(
        f"<details><summary>Settings and runs</summary>{settings_table(arms)}{runs_table(arms)}"
        "</details>"
    )
    return "\n".join(parts)


def _explanation(arms: Sequence[Arm], with_published: bool) -> str:
    seeds = {len(arm.records) for arm in arms}
    number = f"{seeds.pop()} " if len(seeds) == 1 else ""
    text = "One seed. " if number == "1 " else f"Mean ± standard deviation over {number}seeds. "
    if len(arms) > 1:
        text += "The best mean at the last epoch is in bold. "
    judges = {str(r.get("best_by") or "").split("_")[0] for arm in arms for r in arm.records}
    if judges == {"validation"}:
        text += "The best epoch is the one that is best on the validation set."
    elif judges == {"test"}:
        text += "The best epoch is picked with hindsight, by test accuracy, as in several papers."
    if with_published:
        text += " The published figures are the papers' own."
    departures = dict.fromkeys(d for a in arms for r in a.records for d in r.get("departures", ()))
    if departures:
        listed = html.escape("; ".join(departures))
        text += f" <strong>Not as published:</strong> {listed}."
    return text


def _footer(command: str | None) -> str:
    reproduce = f"Reproduce: <code>{html.escape(command)}</code>. " if command else ""
    return f"{reproduce}{html.escape(versions())}. Every number is in {RECORDS}, beside this page."
