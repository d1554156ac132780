"""The demo's report: results.json, table.md, figures, and a page that shows them."""

import html
import json
import string
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from iada.demo.figures import draw_all
from iada.demo.run import machine
from iada.demo.scenarios import IMBALANCE, META, NOISE, SCENARIOS, TEST, TRAIN
from iada.demo.settings import METHODS
from iada.demo.tables import markdown_table, summarise


def write_report(records: Sequence[dict[str, Any]], folder: Path, command: str) -> Path:
    """Write the report of these records into `folder`; the path of its page."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "runs": records}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(records)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    figures = [
        f'<figure><img src="{name}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, caption in draw_all(records, folder).items()
    ]
    page = string.Template(
        resources.files("iada.demo").joinpath("page.html").read_text(encoding="utf-8")
    )
    text = page.substitute(
        introduction=html.escape(
            f"scikit-learn's digits: {TRAIN} training images a class, {META} for the clean and "
            f"balanced meta set, {TEST} for the test. Once with a long tail ({IMBALANCE}:1), once "
            f"with {NOISE:.0%} of the training labels flipped to one other class."
        ),
        table=_html_table(table),
        seeds=len({record["seed"] for record in records}),
        verdict=html.escape(verdict(records)),
        figures="\n".join(figures),
        command=html.escape(command),
        version=metadata.version("iada"),
        torch=torch.__version__,
    )
    path = folder / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def verdict(records: Sequence[dict[str, Any]]) -> str:
    """One sentence a scenario: Meta-IADA against each baseline, losses included."""
    sentences = []
    for scenario, title in SCENARIOS.items():
        methods = [
            m
            for m in METHODS
            if any(r["scenario"] == scenario and r["method"] == m for r in records)
        ]
        if "meta-iada" not in methods or len(methods) == 1:
            continue
        own = summarise(records, scenario, "meta-iada")[0]
        gaps = [
            f"{own - summarise(records, scenario, m)[0]:+.1f} against {METHODS[m]}"
            for m in methods
            if m != "meta-iada"
        ]
        sentences.append(f"{title[0].upper()}{title[1:]}: Meta-IADA {', '.join(gaps)}.")
    return " ".join(sentences)


def _html_table(markdown: str) -> str:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.split("\n")]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_bold(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bold(cell: str) -> str:
    text = html.escape(cell)
    return f"<strong>{text.strip('*')}</strong>" if text.startswith("**") else text
