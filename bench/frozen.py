"""`python -m bench.frozen RUNS`: runs of `iada paper --table frozen` as one file, and a table.

`--json NAME` writes bench/results/NAME.json: a line a run, with its test figures, the relative
change of Σ by Eq. 9 in the first step of each epoch (the largest, and the least and the largest
after the first epoch), seconds, commit, machine, and a digest of
its settings. The first run of an arm has the settings themselves, by which a test knows runs that
are not of today's recipe.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from iada.experiments.metrics import OURS, mean_std, paired
from iada.experiments.recipe import load
from iada.experiments.records import RECORD, deviations_of, read_records
from iada.experiments.report.table import Cell, Table
from iada.experiments.report.tables import difference, shown
from iada.utils.checks import argument_error
from iada.utils.files import write_text

Record = Mapping[str, Any]
RESULTS = Path(__file__).parent / "results"
ROWS = ("frozen/cifar10-100", "frozen/cifar10-flip-40")
COLUMNS = ("long tail 100:1", "40 % flip noise")
KEPT = (
    "experiment", "title", "method", "method_name", "seed", "deviations", "last", "best_epoch",
    "best_by", "settings_digest", "meta_images", "epsilon", "covariance_change", "seconds",
    "finished", "commit", "machine",
)  # fmt: skip
OF_EPSILON = ("class_share", "share_clean", "share_flipped", "label_issues")


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Of a trainer's settings but the seed."""
    values = {name: value for name, value in settings.items() if name != "seed"}
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def summary(record: Record) -> Record:
    """What is kept of a run."""
    epsilon, meta = record["epsilon"], record["split"]["class_counts"].get("meta")
    changes = [row["covariance_change"] for row in record["curve"] if "covariance_change" in row]
    later = [change for change in changes[1:] if change is not None]
    own = {
        "settings_digest": settings_digest(record["settings"]),
        "meta_images": None if meta is None else sum(meta),
        "epsilon": epsilon and {name: epsilon[name] for name in OF_EPSILON},
        "covariance_change": max(changes, default=None),
    }
    whole = {**record, **own}
    found = {name: whole[name] for name in KEPT}
    return {**found, "covariance_change_later": [min(later), max(later)]} if later else found


def collected(folder: Path) -> list[Record]:
    """The runs below `folder`, in the recipes' order.

    ValueError for a damaged one, and for runs that differ in more than method and seed.
    """
    runs = read_records([folder])
    arms = [(row, entry.key) for row in ROWS for entry in load(row).methods]
    known = [run for run in runs if (run["experiment"], run["method"]) in arms]
    kinds = sorted({deviations_of(run) or "as the recipe says" for run in known})
    if len(kinds) > 1:
        remedy = "pass a folder of one kind"
        raise argument_error(folder, "runs of one schedule", "; ".join(kinds), remedy)

    def place(run: Record) -> tuple[int, int, int]:
        row, method = run["experiment"], run["method"]
        return ROWS.index(row), run["seed"], arms.index((row, method))

    lines: list[Record] = []
    seen = set()
    for run in sorted(known, key=place):
        arm = (run["experiment"], run["method"])
        own = {} if arm in seen else {"settings": run["settings"]}
        lines.append({**summary(run), **own})
        seen.add(arm)
    return lines


def table(records: Sequence[Record]) -> str:
    """Markdown: test accuracy of each method, mean ± standard deviation, and Meta-IADA's lead."""
    head, columns = ["method"], []
    for row, title in zip(ROWS, COLUMNS, strict=True):
        runs: dict[str, list[Record]] = {}
        for record in records:
            if record["experiment"] == row:
                runs.setdefault(record["method_name"], []).append(record)
        head += [f"{title}, %", "Meta-IADA less this"]
        columns.append(runs)
    names = dict.fromkeys(name for runs in columns for name in runs)
    ours = next((record["method_name"] for record in records if record["method"] == OURS), None)
    rows = []
    for name in names:
        cells = [Cell(name)]
        for runs in columns:
            own = runs.get(name, [])
            gap = paired(runs[ours], own, "top1") if own and ours in runs and name != ours else None
            figure = shown("top1", mean_std(own)["last"]["top1"], 1) if own else None
            cells += [Cell(figure), Cell(difference("top1", gap))]
        rows.append(cells)
    return Table(head, rows).markdown()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.frozen", description=__doc__)
    parser.add_argument("runs", type=Path, help=f"the --out of the runs, with their {RECORD}")
    parser.add_argument("--json", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    records = collected(options.runs)
    if not records:
        parser.error(f"{options.runs}: expected runs of --table frozen, got none")
    if options.json:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        path = RESULTS / f"{options.json}.json"
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
