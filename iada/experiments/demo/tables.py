"""The demo's results as a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from iada.experiments.demo.scenarios import SCENARIOS
from iada.experiments.demo.settings import METHODS


def summarise(records: Sequence[dict[str, Any]], scenario: str, method: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds (n − 1) of balanced test accuracy, in percent."""
    values = [
        100 * float(np.mean(record["class_accuracy"]))
        for record in records
        if record["scenario"] == scenario and record["method"] == method
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def markdown_table(records: Sequence[dict[str, Any]]) -> str:
    """Balanced test accuracy, mean ± std in percent, the best of each scenario in bold."""
    scenarios = [s for s in SCENARIOS if any(record["scenario"] == s for record in records)]
    methods = [m for m in METHODS if any(record["method"] == m for record in records)]
    lines = [
        "| method | " + " | ".join(SCENARIOS[s] for s in scenarios) + " |",
        "|---|" + "---:|" * len(scenarios),
    ]
    seeds = len({record["seed"] for record in records})
    best = {s: max((summarise(records, s, m)[0], m) for m in methods)[1] for s in scenarios}
    for method in methods:
        cells = []
        for scenario in scenarios:
            mean, std = summarise(records, scenario, method)
            cell = f"{mean:.1f} ± {std:.1f}" if seeds > 1 else f"{mean:.1f}"
            cells.append(f"**{cell}**" if best[scenario] == method else cell)
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
