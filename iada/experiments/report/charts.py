"""The kinds of figures, each from plain arrays; NaN stands for what is not known.

Every one gives its own text for those who cannot see it, with the numbers that matter.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from iada.experiments.report.style import BLUE, RED, Picture, SeriesStyle, legend, paint

MOST_BARS = 30  # categories on an axis with a bar and a name each; more are a line
ROUNDING = float(np.finfo(np.float32).eps)
NUMBERED = 12  # classes up to which a confusion matrix has its numbers written in


class Series(NamedTuple):
    """One method's values: (runs, categories); drawn as their mean with one standard deviation."""

    label: str
    style: SeriesStyle
    values: np.ndarray


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the runs that have a value; a spread of 0 where there is but one, NaN without any."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, values, 0).sum(axis=0) / np.where(count > 0, count, np.nan)
        squares = np.where(known, (values - mean) ** 2, 0).sum(axis=0)
    return mean, np.sqrt(squares / np.maximum(count - 1, 1))


def bars(
    name: str,
    caption: str,
    categories: Sequence[str],
    series: Sequence[Series],
    ylabel: str = "accuracy (%)",
    xlabel: str = "",
    top: float | None = 105,
    height: float = 3.0,
) -> Picture | None:
    """Groups of bars, one group a category, one bar a series; lines where categories are many.

    None without a series.
    """
    if not series:
        return None

    def draw(figure: Any, panels: Sequence[Any]) -> None:
        (axes,) = panels
        x = np.arange(len(categories))
        width = 0.8 / len(series)
        for i, one in enumerate(series):
            mean, error = mean_and_spread(one.values)
            if len(categories) > MOST_BARS:
                _band(axes, x + 1, one)
                continue
            shape = {"color": one.style.colour, "hatch": one.style.hatch, "label": one.label}
            edge = {"edgecolor": "black", "linewidth": 0.3, "error_kw": {"lw": 0.8}}
            centre = x + (i - (len(series) - 1) / 2) * width
            spread = _within(np.nan_to_num(mean), np.nan_to_num(error), top)
            axes.bar(centre, np.nan_to_num(mean), width, yerr=spread, **shape, **edge)
        axes.set(ylabel=ylabel, xlabel=xlabel, ylim=(0, top))
        if len(categories) <= MOST_BARS:
            axes.set_xticks(x)
            _label_ticks(axes, categories)
        legend(figure, axes)

    alt = f"Chart of {ylabel}. " + " ".join(_extremes(one, categories) for one in series)
    return paint(name, caption, alt, draw, height=height)


def curves(
    name: str,
    caption: str,
    panels: Mapping[str, Sequence[Series]],
    xlabel: str = "epoch",
    ylabel: str = "",
    positions: Mapping[str, Sequence[float]] | None = None,
    height: float = 3.0,
) -> Picture | None:
    """Lines with bands, a panel each, over `xlabel` from 1 on; None without a panel.

    The keys of `panels` say what is on the y axes; with `ylabel`, which all panels then share, they
    are titles, and with `positions` on the x axes, by key, they say what these are.
    """
    if not panels:
        return None

    def draw(figure: Any, axes_of: Sequence[Any]) -> None:
        for axes, (key, series) in zip(axes_of, panels.items(), strict=True):
            for one in series:
                x = np.arange(1, one.values.shape[1] + 1) if positions is None else positions[key]
                _band(axes, x, one)
            axes.set(xlabel=xlabel if positions is None else key, ylabel=ylabel or key)
            if positions is None:
                axes.locator_params(axis="x", integer=True)
            if ylabel and positions is None:
                axes.set_title(key)
        legend(figure, max(axes_of, key=lambda a: len(a.get_legend_handles_labels()[1])))

    alt = "Lines."
    for key, series in panels.items():
        courses = [_course(one, positions[key] if positions else None) for one in series]
        alt += f" {_said(key, ylabel, xlabel, positions is not None)}: {', '.join(courses)}."
    columns = 3 if len(panels) == 3 else 2
    return paint(name, caption, alt, draw, len(panels), columns, height)


def epsilon_by_label(
    name: str, caption: str, shares: np.ndarray, clean: np.ndarray, flipped: np.ndarray
) -> Picture:
    """Right against wrong labels: shares of adversarial samples, and histograms of ε.

    shares: (runs, 2) in percent. clean, flipped: visits in equal bins of ε over (−1, 1), (bins).
    """
    names, colours = ("right label", "flipped label"), (BLUE, RED)
    mean, error = mean_and_spread(shares)

    def draw(figure: Any, panels: Sequence[Any]) -> None:
        left, right = panels
        left.bar(
            names, mean, yerr=error if error.any() else None, color=colours, error_kw={"lw": 0.8}
        )
        left.set(ylabel="adversarial (%)", ylim=(0, 105))
        for label, colour, counts in zip(names, colours, (clean, flipped), strict=True):
            edges = np.linspace(-1, 1, len(counts) + 1)
            visits = 100 * counts / max(counts.sum(), 1)
            right.stairs(visits, edges, fill=True, alpha=0.6, color=colour, label=label)
        right.axvline(0, color="black", lw=0.8)
        right.set(xlabel="ε", ylabel="visits (%)", xlim=(-1, 1))
        right.set_xticks((-1, -0.5, 0, 0.5, 1))
        legend(figure, right)

    said = " and ".join(f"{m:.1f} % of those with a {n}" for n, m in zip(names, mean, strict=True))
    alt = f"Bars and a histogram of ε. Adversarial samples: {said}."
    return paint(name, caption, alt, draw, 2, 2, 2.8)


def confusions(
    name: str, caption: str, matrices: Mapping[str, np.ndarray], classes: Sequence[str]
) -> Picture:
    """Confusion matrices, (C, C) counts each, as the share of each true class, side by side."""
    shares = {
        label: 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for label, counts in matrices.items()
    }

    def draw(figure: Any, panels: Sequence[Any]) -> None:
        for axes, (label, share) in zip(panels, shares.items(), strict=True):
            image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
            axes.set(xlabel="predicted", ylabel="true")
            axes.set_title(label)
            axes.grid(False)
            if len(classes) <= NUMBERED:
                _write_numbers(axes, share)
                axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
                axes.set_yticks(range(len(classes)), classes, fontsize=7)
        if len(classes) > NUMBERED:
            figure.colorbar(image, ax=list(panels), label="share of the true class (%)", shrink=0.7)

    alt = "Confusion matrices. " + " ".join(
        f"{label}: {_worst_confusion(share, classes)}." for label, share in shares.items()
    )
    columns = 3 if len(shares) in (3, 5, 6) or len(classes) < 4 else 2
    return paint(name, caption, alt, draw, len(shares), columns, 3.0 if columns == 3 else 3.8)


def spectra(
    name: str, caption: str, panels: Mapping[str, np.ndarray], alt: str, order: str
) -> Picture:
    """Eigenvalues of each class, (C, A) descending, log scale, the classes from dark to light.

    What is rounding beside the largest, in float32, is left out. order: what the colours follow.
    """

    def draw(figure: Any, axes_of: Sequence[Any]) -> None:
        import matplotlib
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator

        most = max(2, *(len(values) for values in panels.values()))
        colours = matplotlib.colormaps["viridis"]
        for axes, (label, values) in zip(axes_of, panels.items(), strict=True):
            for rank, row in enumerate(values):
                shown = np.where(row > ROUNDING * values.max(), row, np.nan)
                colour = colours(rank / (most - 1))
                axes.plot(np.arange(1, len(row) + 1), shown, color=colour, lw=1)
            axes.set(title=label, xlabel="direction", ylabel="eigenvalue", yscale="log")
        scale = ScalarMappable(Normalize(1, most), colours)
        ticks = MaxNLocator(integer=True)
        figure.colorbar(scale, ax=list(axes_of), label=order, ticks=ticks)

    return paint(name, caption, alt, draw, len(panels), 2, 3.0)


def _within(mean: np.ndarray, error: np.ndarray, top: float | None) -> np.ndarray | None:
    """Error bars down and up, (2, N); those of percentages end at 0 and 100. None without any."""
    if not error.any():
        return None
    if top is None:
        return np.stack([error, error])
    return np.stack([np.minimum(error, mean), np.minimum(error, np.maximum(100 - mean, 0))])


def _band(axes: Any, x: Sequence[float] | np.ndarray, one: Series) -> None:
    mean, error = mean_and_spread(one.values)
    known = np.isfinite(mean)  # a line goes on over categories without a value
    x, mean, error = np.asarray(x)[known], mean[known], error[known]
    look = {"color": one.style.colour, "lw": 1.5, "marker": "o" if len(mean) < 8 else None}
    axes.plot(x, mean, one.style.dashes, label=one.label, ms=4, **look)
    if error.any():
        axes.fill_between(x, mean - error, mean + error, color=one.style.colour, alpha=0.15, lw=0)


def _label_ticks(axes: Any, names: Sequence[str]) -> None:
    """Names at the ticks, in two lines or slanted where they would run into each other."""
    room = int(12 * axes.figure.get_figwidth() / len(names)) - 1  # characters
    wrapped = [textwrap.wrap(name, max(room, 1), break_long_words=False) for name in names]
    if all(len(lines) <= 2 and max(map(len, lines), default=0) <= room for lines in wrapped):
        axes.set_xticklabels(["\n".join(lines) for lines in wrapped])
    else:
        axes.set_xticklabels(names, rotation=45, ha="right", rotation_mode="anchor")


def _write_numbers(axes: Any, share: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.5:
            # Not black, which follows the page's scheme.
            look = {"color": "white" if value < 55 else "#111111", "ha": "center", "va": "center"}
            axes.text(column, row, f"{value:.0f}", fontsize=6.5 if len(share) > 5 else 10, **look)


def _extremes(one: Series, categories: Sequence[str]) -> str:
    mean, _ = mean_and_spread(one.values)
    known = [pair for pair in zip(mean, categories, strict=True) if np.isfinite(pair[0])]
    if not known:
        return f"{one.label}: nothing known."
    low, high = min(known), max(known)
    return f"{one.label}: from {low[0]:.1f} ({low[1]}) to {high[0]:.1f} ({high[1]})."


def _said(key: str, ylabel: str, xlabel: str, placed: bool) -> str:
    """What a panel shows, in words."""
    if placed:
        return f"{ylabel} over {key}"
    return f"{key}: {ylabel} over {xlabel}" if ylabel else f"{key} over {xlabel}"


def _course(one: Series, positions: Sequence[float] | None) -> str:
    """Where a curve ends, or with positions each of its values."""
    mean, _ = mean_and_spread(one.values)
    if positions is not None:
        pairs = zip(positions, mean, strict=True)
        said = [f"{value:.1f} at {place:g}" for place, value in pairs if np.isfinite(value)]
        return f"{one.label} {', '.join(said)}"
    known = mean[np.isfinite(mean)]
    return f"{one.label} ends at {known[-1]:.3g}" if len(known) else f"{one.label} unknown"


def _worst_confusion(share: np.ndarray, classes: Sequence[str]) -> str:
    off = share - np.diag(share.diagonal())
    row, column = divmod(int(off.argmax()), len(classes))
    return (
        f"{share.diagonal().mean():.1f} % on the diagonal on average; most often mistaken is "
        f"{classes[row]} for {classes[column]}, {off[row, column]:.1f} %"
    )
