"""Pictures of what bench measured, as SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import matplotlib.lines
import numpy as np

LOOK = {  # of a side: colour and marker
    "eager": ("#4c4c4c", "o"),
    "compiled eager": ("#b07aa1", "s"),
    "torch": ("#4e79a7", "^"),
    "native": ("#e15759", "D"),
    "fused": ("#e15759", "D"),
    "cross-entropy": ("#59a14f", "v"),
    "F.linear_cross_entropy": ("#edc948", "x"),
}
# Text stays text, and two runs of the same numbers give the same bytes.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "iada", "font.size": 9}


def plot_scaling(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """time.svg and memory.svg: a row of panels for each structure, a panel for each axis."""
    figures = {
        "time": ("ms", "ms, forward and backward", 0.0),
        "memory": ("extra_bytes", "bytes beyond inputs and gradients", 2**17),
    }
    paths = []
    for name, (key, label, least) in figures.items():
        paths.append(folder / f"{name}.svg")
        with mpl.rc_context(STYLE):
            _panels(rows, key, label, least).savefig(paths[-1], metadata={"Date": None})
    return paths


def plot_speed(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a step at each shape, a bar a side; rows of `bench` or `bench.cpu`."""
    rows = [row for row in rows if row.get("threads", 1) == 1]
    keys = ("eager_ms", "torch_ms", "fused_ms", "native_ms", "cross_entropy_ms")
    sides = [key for key in keys if any(key in row for row in rows)]
    with mpl.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
        panel = figure.subplots()
        places, width = np.arange(len(rows)), 0.8 / len(sides)
        for i, key in enumerate(sides):
            name = key.removesuffix("_ms").replace("_", "-")
            taken = [row.get(key, np.nan) for row in rows]
            bars: Any = {"color": LOOK[name][0], "label": name}
            panel.bar(places + (i + 0.5) * width - 0.4, taken, width, **bars)
        panel.set_xticks(places, [_in_lines(row["shape"]) for row in rows], fontsize=6.5)
        panel.set(yscale="log", ylabel="ms, forward and backward")
        panel.grid(True, axis="y", linewidth=0.4, alpha=0.5)
        figure.legend(loc="outside upper center", ncols=len(sides), frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _in_lines(shape: str) -> str:
    """A shape's name, sizes and structure below each other."""
    name, sizes = shape.rstrip(")").split(" (")
    *numbers, structure = sizes.split(", ")
    return f"{name}\n{', '.join(numbers)}\n{structure}"


def _panels(
    rows: Sequence[dict[str, Any]], key: str, label: str, least: float
) -> matplotlib.figure.Figure:
    """least: what is not more cannot be told from the process's own needs."""
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    size = (3.2 * len(axes), 2.7 * len(structures) + 0.4)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(structures), len(axes), squeeze=False)
    for line, structure in zip(panels, structures, strict=True):
        for panel, axis in zip(line, axes, strict=True):
            place = (structure, axis)
            here = [row for row in rows if (row["structure"], row["axis"]) == place]
            here = [row for row in here if row[key] > least]
            if not here:
                panel.set_visible(False)
                continue
            for side in sides:
                points = sorted((row["size"], row[key]) for row in here if row["side"] == side)
                panel.plot(*np.array(points).reshape(-1, 2).T, **_drawn_as(side))
            panel.set(xscale="log", yscale="log", xlabel=axis, title=f"Σ {structure}")
            panel.set_xticks(sorted({row["size"] for row in here}), minor=False)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.minorticks_off()
            panel.grid(True, which="major", linewidth=0.4, alpha=0.5)
        line[0].set_ylabel(label)
    handles = [matplotlib.lines.Line2D([], [], label=side, **_drawn_as(side)) for side in sides]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(sides), frameon=False)
    return figure


def _drawn_as(side: str) -> Any:
    """The look of a side's line."""
    colour, marker = LOOK[side]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}
