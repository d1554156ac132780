"""docs/controls.md and the records that it speaks of."""

import json
from pathlib import Path

import pytest

from iada.experiments.recipe import load
from iada.experiments.records import with_defaults

ROOT = Path(__file__).parents[2]
LABELS = {
    "CE": "ce",
    "deferred LA, ×0.01": "deferred-la",
    "deferred LA, ×0.1": "deferred-la-tenth",
    "deferred LA + G, ×0.01": "deferred-la-g",
    "deferred LA + G, ×0.1": "deferred-la-g-tenth",
    "CE-DRW from 160 on, ×0.01": "ce-drw",
    "class-balanced CE + ISDA, ×0.01": "class-balanced-isda",
    "LA from scratch": "logit-adjustment",
    "MetaSAug, ×0.01": "metasaug",
    "Meta-IADA, ×0.01": "meta-iada",
    "Meta-IADA, ×0.1": "meta-iada-tenth",
    "Meta-IADA, Ω left untrained": "untrained",
    "Meta-IADA, Ω from zero": "zero-start",
    "constant ε = 0.1, ×0.01": "constant-0.1",
    "constant ε = 0.3, ×0.01": "constant-0.3",
    "Meta-IADA, ε scaled by 0.1": "scale-0.1",
    "Meta-IADA, ε in class deviations": "class-deviation",
    "Meta-IADA, Σ learned free of the rate": "rate-free-covariance",
    "Meta-IADA, Ω learned free of the rate": "rate-free-network",
}


@pytest.fixture(scope="module")
def records():
    found = json.loads((ROOT / "bench/results/paper.json").read_text(encoding="utf-8"))
    return [record for record in found if record["experiment"] == "controls/cifar10-100"]


def table_after(heading):
    """The cells of the first table of the page that has this in its head."""
    text = (ROOT / "docs/controls.md").read_text(encoding="utf-8")
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_results_are_the_records(records):
    shown = {
        (LABELS[label], last, best)
        for label, _, last, best, _ in table_after("| arm | expected | last | best |")
    }
    assert shown == {
        (r["method"], f"{100 * r['last']['top1']:.1f}", f"{100 * r['best']['top1']:.1f}")
        for r in records
    }


def test_the_balance_is_the_records(records):
    rows = table_after("| arm, of which a checkpoint is at hand |")
    assert rows
    shown = {(LABELS[arm], *map(number, figures)) for arm, *figures in rows}
    known = set()
    for record in records:
        if found := record.get("balance"):
            best = max(found["top1"])
            tau = found["tau"][found["top1"].index(best)]
            figures = (100 * record["last"]["top1"], 100 * best)
            known.add((record["method"], *(round(f, 1) for f in figures), tau))
    assert shown == known


def number(cell):
    return float(cell.replace("− ", "-"))


def test_every_arm_has_its_expectation():
    expected = {row[0] for row in table_after("| arm | expected | published |")}
    assert {label for label in expected if label in LABELS} == set(LABELS)
    keys = {entry.key for entry in load("controls/cifar10-100").methods}
    assert set(LABELS.values()) | {"ce-with-meta", "la-with-meta"} == keys


def test_the_records_are_of_the_recipe(records):
    """But what the command of the page sets, and options that were not there yet."""
    set_by_the_page = {"seed", "autocast", "channels_last"}
    entries = {entry.key: entry for entry in load("controls/cifar10-100").methods}
    for record in records:
        used = json.loads(json.dumps(with_defaults(record["settings"])))
        own = json.loads(json.dumps(entries[record["method"]].trainer.settings()))
        differing = {name for name in own if used.get(name) != own[name]}
        assert differing <= set_by_the_page, record["method"]
        assert used["autocast"] == "bfloat16"
        assert used["channels_last"] is True
