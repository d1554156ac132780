"""The demo's report: results.json, table.md, figures, and a page that shows them."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iada.experiments.demo.figures import draw_all
from iada.experiments.demo.scenarios import IMBALANCE, META, NOISE, SCENARIOS, TEST, TRAIN
from iada.experiments.demo.settings import METHODS
from iada.experiments.demo.tables import markdown_table, summarise
from iada.experiments.report.page import figure, render, versions
from iada.experiments.report.tables import table as html_table
from iada_kernels.environment import environment


def write_report(records: Sequence[dict[str, Any]], folder: Path, command: str) -> Path:
    """Write the report of these records into `folder`; the path of its page."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": environment(), "runs": records}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(records)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    introduction = (
        f"scikit-learn's digits: {TRAIN} training images a class, {META} for the clean and "
        f"balanced meta set, {TEST} for the test. Once with a long tail ({IMBALANCE}:1), once "
        f"with {NOISE:.0%} of the training labels flipped to one other class."
    )
    seeds = len({record["seed"] for record in records})
    content = [
        f"<p>{html.escape(introduction)}</p>",
        f"<h2>Balanced test accuracy (%)</h2>{_html_table(table)}",
        f"<p>Mean ± standard deviation over {seeds} seeds; the best mean of each column in bold.",
        f"</p><p>{html.escape(verdict(records))}</p>",
        "<h2>Figures</h2>",
        *(figure(picture, folder) for picture in draw_all(records)),
    ]
    footer = (
        f"Reproduce: <code>{html.escape(command)}</code> ({html.escape(versions())}). Every number "
        'is in <a href="results.json">results.json</a>.'
    )
    path = folder / "index.html"
    path.write_text(render("IADA on digits", "\n".join(content), footer), encoding="utf-8")
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
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = [
        f'<th scope="row">{_bold(row[0])}</th>'
        + "".join(f"<td>{_bold(cell)}</td>" for cell in row[1:])
        for row in rows[2:]
    ]
    return html_table(f"<tr>{head}</tr>", body)


def _bold(cell: str) -> str:
    text = html.escape(cell)
    return f"<strong>{text.strip('*')}</strong>" if text.startswith("**") else text
