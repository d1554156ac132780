"""How figures look: colours, sizes, and the two pictures of each, for wide and narrow screens."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# Okabe and Ito's colours, which colour-blind readers can tell apart, and their grey. A method has
# the same one on every page where it is not taken.
PREFERRED = {
    "ce": "#999999",
    "ce+meta": "#000000",
    "cb-ce": "#F0E442",
    "cb-focal": "#000000",
    "ldam-drw": "#CC79A7",
    "logit-adjustment": "#56B4E9",
    "deferred-la": "#CC79A7",
    "isda": "#E69F00",
    "cmo": "#F0E442",
    "afr": "#CC79A7",
    "metasaug": "#009E73",
    "meta-weight-net": "#0072B2",
    "meta-iada": "#D55E00",
}
PALETTE = tuple(dict.fromkeys(reversed(PREFERRED.values())))
BLUE, RED = "#0072B2", "#D55E00"  # right and wrong labels
HATCHES = ("", "///", "...", "xxx")
DASHES = ("-", "--", ":", "-.")

RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.hspace": 0.06,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "iada",
    "savefig.dpi": 160,
}
# What is drawn in black takes the colour of the page's text, and the grid that of its lines, so
# that one picture serves light and dark screens.
SCHEME = {"#000000": "currentColor", "#e5e5e5": "var(--line, #e5e5e5)"}
LEGEND_LINES = 4  # that a figure has room for
WIDE, NARROW = 8.4, 4.0  # inches; on screen the text of both has about the size of the page's


class SeriesStyle(NamedTuple):
    """A series of a figure: colour, and hatch and dashes where the colours do not suffice."""

    colour: str
    hatch: str = ""
    dashes: str = "-"


@dataclass(frozen=True)
class Picture:
    """A figure: file name without ending, caption, text for those who cannot see it, two SVGs."""

    name: str
    caption: str
    alt: str
    wide: str
    narrow: str


def series_styles(methods: Sequence[str]) -> list[SeriesStyle]:
    """A style for each series, all different, by its method's name."""
    taken: list[SeriesStyle] = []
    for method in methods:
        first = PREFERRED.get(method)
        colours = [c for c in (first, *PALETTE) if c is not None]
        candidates = [
            SeriesStyle(colour, hatch, dashes)
            for hatch, dashes in zip(HATCHES, DASHES, strict=True)
            for colour in colours
        ]
        free = [style for style in candidates if style not in taken]
        taken.append(free[0] if free else candidates[0])
    return taken


def paint(
    name: str,
    caption: str,
    alt: str,
    draw: Callable[[Any, Sequence[Any]], None],
    panels: int = 1,
    columns: int = 1,
    height: float = 3.0,
) -> Picture:
    """The picture that `draw(figure, axes)` makes on `panels` axes of `height` inches.

    A wide one with up to `columns` panels side by side, and a narrow one with them below each
    other. No global state of matplotlib is changed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    pages = []
    for kind, width, across in (("wide", WIDE, min(columns, panels)), ("narrow", NARROW, 1)):
        with matplotlib.rc_context(RC):
            down = -(-panels // across)
            figure = Figure(figsize=(width, height * down + 0.3), layout="constrained")
            axes = list(figure.subplots(down, across, squeeze=False).flat)
            for spare in axes[panels:]:
                spare.set_visible(False)
            file = io.StringIO()
            # Names are kept as text, in the fonts of who reads them.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
                draw(figure, axes[:panels])
                figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            pages.append(_inline(file.getvalue(), f"{name}-{kind}-"))
    return Picture(name, caption, alt, *pages)


def _inline(text: str, prefix: str) -> str:
    """matplotlib's SVG as a part of a page: its ids are its own, its black the text's colour."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}", text).replace("xlink:href", "href")
    for colour, shown in SCHEME.items():
        text = text.replace(colour, shown)
    return text


def legend(figure: Any, axes: Any) -> None:
    """The names of what `axes` shows, below the whole figure, if there are several."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) < 2:
        return
    room = 11 * figure.get_figwidth() / (max(map(len, names)) + 5)  # characters of a line
    columns = max(1, min(len(names), int(room)))
    lines = -(-len(names) // columns)
    if lines > LEGEND_LINES:  # else nothing would be left of the axes
        figure.set_figheight(figure.get_figheight() + 0.2 * (lines - LEGEND_LINES))
    figure.legend(handles, names, ncols=columns, loc="outside lower center", fontsize=9)
