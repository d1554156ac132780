"""The tables of a page, as HTML."""

import html
from collections.abc import Mapping, Sequence

from iada.experiments.metrics import METRICS, Spread
from iada.experiments.report.variants import Arm, Record, differing_settings

# (experiment, method or method's name) → metric → percent
Published = Mapping[tuple[str, str], Mapping[str, float]]
NOT_KNOWN = '<td class="none">–</td>'
SHOWN = ("processor", "capability", "device", "torch", "backend")  # of a machine
LOWER_IS_BETTER = ("ece",)


def headline_metrics(arms: Sequence[Arm], published: Sequence[Mapping[str, float]]) -> list[str]:
    """The metrics to show first: those published, else the groups' or top-1, else any."""
    shown = [m for m in METRICS if any(m in figures for figures in published)]
    measured = {m for arm in arms for figures in arm.figures.values() for m in figures}
    if not shown:
        preferred = ("average", "worst_group") if "worst_group" in measured else ("top1",)
        shown = [m for m in preferred if m in measured]
    return shown or [m for m in METRICS if m in measured][:1]


def published_of(
    published: Published, experiment: str, arm: Arm, arms: Sequence[Arm]
) -> Mapping[str, float]:
    """The published figures of an arm: under its name, or under its method where no other arm has
    that. Empty if there are none."""
    if (experiment, arm.name) in published:
        return published[experiment, arm.name]
    alone = sum(other.method == arm.method for other in arms) == 1
    return published.get((experiment, arm.method), {}) if alone else {}


def headline_table(
    arms: Sequence[Arm], metrics: Sequence[str], published: Sequence[Mapping[str, float]]
) -> str:
    """Last and best epoch side by side and the published figure, for each of `metrics`.

    The number of seeds has a column where it is not the same for all.
    """
    with_published = any(published)
    with_seeds = len({len(arm.records) for arm in arms}) > 1
    under = ["last epoch", "best epoch", *["published"] * with_published]
    top = "".join(
        f'<th scope="colgroup" colspan="{len(under)}">{METRICS[m]} (%)</th>' for m in metrics
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in under) * len(metrics)
    seeds = '<th rowspan="2" scope="col">seeds</th>' if with_seeds else ""
    head = f'<tr><th rowspan="2" scope="col">method</th>{top}{seeds}</tr><tr>{names}</tr>'
    best = {m: _best(arms, m) for m in metrics}
    rows = []
    for arm, known in zip(arms, published, strict=True):
        cells = []
        for metric in metrics:
            last, peak = (arm.figures[epoch].get(metric) for epoch in ("last", "best"))
            cells.append(_cell(_shown(last), arm.label in best[metric]))
            cells.append(_cell(_shown(peak)))
            if with_published:
                cells.append(_cell(f"{known[metric]:.2f}" if metric in known else None))
        if with_seeds:
            cells.append(_cell(str(len(arm.records))))
        rows.append(f"{_row_head(arm.label)}{''.join(cells)}")
    return table(head, rows)


def details_table(arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """Every metric that some arm has: the last epoch, below it the best.

    Empty if all of them are among `metrics`, which are shown already.
    """
    shown = [m for m in METRICS if any(m in arm.figures["last"] for arm in arms)]
    if set(shown) <= set(metrics):
        return ""
    head = "".join(f'<th scope="col">{METRICS[m]}</th>' for m in shown)
    rows = []
    for arm in arms:
        cells = []
        for metric in shown:
            last, peak = (_shown(arm.figures[epoch].get(metric)) for epoch in ("last", "best"))
            below = f"<br><small>{peak}</small>" if peak else ""
            cells.append(NOT_KNOWN if last is None else f"<td>{last}{below}</td>")
        rows.append(f"{_row_head(arm.label)}{''.join(cells)}")
    content = table(f'<tr><th scope="col">method</th>{head}</tr>', rows)
    note = "<p>In percent, at the last epoch; below, at the best one.</p>"
    return f"<details><summary>All metrics</summary>{content}{note}</details>"


def overview_table(titles: Mapping[str, str], arms: Mapping[str, Sequence[Arm]]) -> str:
    """Methods by experiments: each experiment's first headline metric at the last epoch."""
    labels = list(dict.fromkeys(arm.label for part in arms.values() for arm in part))
    metric = {e: headline_metrics(part, [])[:1] for e, part in arms.items()}
    head = "".join(f'<th scope="col">{html.escape(titles[e])}</th>' for e in arms)
    rows = []
    for label in labels:
        cells = []
        for experiment, part in arms.items():
            found = [arm for arm in part if arm.label == label]
            text, best = None, False
            for m in metric[experiment] if found else []:
                text = _shown(found[0].figures["last"].get(m))
                best = label in _best(part, m)
            cells.append(_cell(text, best))
        rows.append(f"{_row_head(label)}{''.join(cells)}")
    return table(f'<tr><th scope="col">method</th>{head}</tr>', rows)


def runs_table(arms: Sequence[Arm]) -> str:
    """One row a run: its time, its best epoch and its machine."""
    names = ("method", "seed", "best epoch", "minutes", "machine")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for arm in arms:
        for record in arm.records:
            seconds, epoch = record.get("seconds"), record.get("best_epoch")
            cells = (
                _cell(str(record.get("seed", 0))),
                _cell(None if epoch is None else str(epoch)),
                _cell(None if seconds is None else f"{seconds / 60:.1f}"),
                _cell(_machine(record)),
            )
            rows.append(f"{_row_head(arm.label)}{''.join(cells)}")
    return table(f"<tr>{head}</tr>", rows)


def settings_table(arms: Sequence[Arm]) -> str:
    """The settings that differ between arms, and below the table those that do not."""
    runs = [record for arm in arms for record in arm.records]
    differing = [name for name in differing_settings(runs) if name != "method"]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in differing)
    rows = []
    for arm in arms:
        settings = arm.records[0].get("settings") or {}
        cells = (_cell(str(settings[n]) if n in settings else None) for n in differing)
        rows.append(f"{_row_head(arm.label)}{''.join(cells)}")
    same = {
        name: value
        for run in runs
        for name, value in (run.get("settings") or {}).items()
        if name not in (*differing, "method", "seed")
    }
    common = ", ".join(f"{name} {value}" for name, value in same.items())
    shown = table(f'<tr><th scope="col">method</th>{head}</tr>', rows) if differing else ""
    return f"{shown}<p>For all: {html.escape(common)}.</p>" if common else shown


def table(head: str, rows: Sequence[str]) -> str:
    """A table that scrolls by itself where the screen is narrow, by keyboard too."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _best(arms: Sequence[Arm], metric: str) -> set[str]:
    """The labels of the arms that are best in `metric` at the last epoch, as far as is shown.

    None of fewer than two that can be compared.
    """
    known = {
        arm.label: round(100 * arm.figures["last"][metric].mean, 2)
        for arm in arms
        if metric in arm.figures["last"]
    }
    if len(known) < 2:
        return set()
    best = (min if metric in LOWER_IS_BETTER else max)(known.values())
    return {label for label, value in known.items() if value == best}


def _shown(value: Spread | None) -> str | None:
    """In percent: mean ± std, and over how many runs if that is not all."""
    if value is None:
        return None
    mean = f"{100 * value.mean:.2f}"
    return mean if value.std is None else f"{mean} ± {100 * value.std:.2f}"


def _cell(text: str | None, bold: bool = False) -> str:
    if text is None:
        return NOT_KNOWN
    shown = html.escape(text)
    return f"<td><strong>{shown}</strong></td>" if bold else f"<td>{shown}</td>"


def _row_head(label: str) -> str:
    return f'<th scope="row">{html.escape(label)}</th>'


def _machine(record: Record) -> str | None:
    machine = record.get("machine")
    if isinstance(machine, Mapping):
        return ", ".join(str(machine[name]) for name in SHOWN if name in machine) or None
    return None if machine is None else str(machine)
