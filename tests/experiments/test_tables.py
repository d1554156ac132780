"""Tables of a report, cell by cell: which figure, of which epoch, in which unit, what is best."""

import pytest
from scipy import stats

from iada.experiments.metrics import Paired, Spread
from iada.experiments.report.corruptions import corruption_table
from iada.experiments.report.tables import (
    details_table,
    difference,
    headline_metrics,
    headline_table,
    overview_table,
    published_of,
    runs_table,
    settings,
    shown,
)
from iada.experiments.report.variants import is_noisy, variants_of
from iada.experiments.report.variants import tested_on as part_tested_on


def record(method, seed=0, last=None, best=None, **more):
    return {
        "experiment": "e",
        "method": method,
        "method_name": method.upper(),
        "seed": seed,
        "settings": {"method": method, "lr": 0.1, "seed": seed},
        "last": last or {},
        "best": best or {},
        **more,
    }


def texts(table):
    """The rows, with stars where they are bold."""
    rows = [[f"*{cell.text}*" if cell.bold else cell.text for cell in row] for row in table.rows]
    return [list(table.head), *rows]


def headline(records, metrics, **options):
    variants = variants_of(records)
    return texts(headline_table(variants, metrics, [{}] * len(variants), **options))


def test_each_metric_has_its_own_best_and_losses_are_least_at_their_best():
    ce = {"top1": 0.5, "nll": 1.25, "ece": 0.25}
    ours = {"top1": 0.75, "nll": 1.5, "ece": 0.25}
    records = [record("ce", last=ce, best={"top1": 0.625}), record("meta-iada", last=ours)]
    assert headline(records, ["top1", "nll", "ece"]) == [
        [
            "method",
            *("Top-1 accuracy (%), last epoch", "best epoch"),
            *("NLL (nats), last epoch", "best epoch"),
            *("Calibration error (%), last epoch", "best epoch"),
        ],
        ["CE", "50.00", "62.50", "*1.25*", None, "*25.00*", None],
        ["META-IADA", "*75.00*", None, "1.50", None, "*25.00*", None],
    ]
    assert headline(records[:1], ["top1"])[1] == ["CE", "50.00", "62.50"]  # nothing to compare


@pytest.mark.parametrize(
    ("metric", "one", "other"), [("top1", 0.50001, 0.50003), ("nll", 0.501, 0.504)]
)
def test_what_is_shown_alike_is_alike_the_best(metric, one, other):
    records = [record("ce", last={metric: one}), record("isda", last={metric: other})]
    rows = headline(records, [metric])
    assert rows[1][1] == rows[2][1]
    assert rows[1][1].startswith("*")


def test_the_overview_is_bold_at_its_own_decimals():
    records = [record("ce", last={"top1": 0.5001}), record("isda", last={"top1": 0.5003})]
    variants = {"e": variants_of(records)}
    wanted = {1: ["*50.0*", "*50.0*"], 2: ["50.01", "*50.03*"]}
    for decimals, cells in wanted.items():
        table = texts(overview_table({"e": "E"}, variants, decimals))
        assert [row[1] for row in table[1:]] == cells
    assert table[0] == ["method", "E"]


def test_the_lead_is_of_the_seeds_that_both_have():
    """Three seeds of two methods, of which two are the same, and one seed of a third."""
    ours = [record("meta-iada", s, {"top1": v}) for s, v in ((0, 0.7), (1, 0.8), (2, 0.9))]
    ce = [record("ce", s, {"top1": v}) for s, v in ((1, 0.7), (2, 0.75), (3, 0.1))]
    once = [record("isda", 0, {"top1": 0.5})]
    rows = headline([*ours, *ce, *once], ["top1"])
    assert rows[0][-2:] == ["seeds", "META-IADA less this, paired"]
    by_name = {row[0]: row[-2:] for row in rows}
    gap = stats.ttest_rel([0.8, 0.9], [0.7, 0.75])
    low, high = (100 * edge for edge in gap.confidence_interval(0.95))
    lead = f"+{(low + high) / 2:.1f} ± {(high - low) / 2:.1f} (p {gap.pvalue:.3f})"
    assert lead == "+12.5 ± 31.8 (p 0.126)"
    assert by_name["CE"] == ["3", lead]
    assert by_name["ISDA"] == ["1", None]
    assert by_name["META-IADA"] == ["3", None]
    arms = [{**one, "method_name": "META-IADA 2"} for one in ours]
    assert "paired" not in " ".join(headline([*ours, *arms, *ce], ["top1"])[0])  # of which one?


def test_how_a_difference_is_written():
    assert difference("top1", Paired(0.0495, 0.0125, 0.00125, 3)) == "+5.0 ± 1.2 (p 0.001)"
    assert difference("top1", Paired(-0.0495, 0.01, 0.0009, 3)) == "-5.0 ± 1.0 (p < 0.001)"
    assert difference("nll", Paired(0.125, 0.0625, 0.25, 3)) == "+0.12 ± 0.06 (p 0.250)"
    assert difference("top1", Paired(0.25, 0.0, None, 3)) == "+25.0 ± 0.0"
    assert difference("top1", Paired(0.7015 - 0.65, None, None, 1)) == "+5.2"  # 5.1499…
    assert difference("top1", None) is None
    assert shown("nll", Spread(1.25, 0.5, 2)) == "1.25 ± 0.50"
    assert shown("top1", Spread(0.125, None, 1), 1) == "12.5"


def test_which_metrics_come_first():
    groups = variants_of([record("ce", last={"top1": 1, "average": 1, "worst_group": 1})])
    classes = variants_of([record("ce", last={"nll": 1, "balanced": 1, "top1": 1})])
    other = variants_of([record("ce", last={"nll": 1, "balanced": 1})])
    assert headline_metrics(groups, []) == ["average", "worst_group"]
    assert headline_metrics(classes, []) == ["top1"]
    assert headline_metrics(other, []) == ["balanced"]
    assert headline_metrics(groups, [{}, {"precision": 50.0, "top1": 60.0}]) == [
        "top1",
        "precision",
    ]


def test_details_have_the_best_epoch_below_the_last_one():
    variants = variants_of([record("ce", last={"top1": 0.5, "few": 0.25}, best={"few": 0.75})])
    table = details_table(variants, ["top1"])
    assert list(table.head) == ["method", "Top-1 accuracy", "Few-shot (< 20)"]
    assert [(cell.text, cell.small) for cell in table.rows[0][1:]] == [
        ("50.00", None),
        ("25.00", "75.00"),
    ]
    assert details_table(variants, ["few", "top1", "nll"]) is None


def test_published_figures_are_of_one_variant():
    variants = variants_of([record("ce"), record("isda"), record("isda", method_name="ISDA 2")])
    published = {("e", "ce"): {"top1": 1.0}, ("e", "isda"): {"top1": 2.0}, ("e", "ISDA 2"): {}}
    found = [published_of(published, "e", variant, variants) for variant in variants]
    assert found == [{"top1": 1.0}, {}, {}]


def test_runs_and_what_they_have_in_common():
    machine = {"device": "cpu", "torch": "2", "host": "x"}
    runs = [record("ce", 1, seconds=90, best_epoch=0, machine=machine), record("isda")]
    runs[1]["settings"]["alpha"] = 0.5
    variants = variants_of(runs)
    assert texts(runs_table(variants)) == [
        ["method", "seed", "best epoch", "minutes", "machine"],
        ["CE", "1", "0", "1.5", "cpu, 2"],
        ["ISDA", "0", None, None, None],
    ]
    table, common = settings(variants)
    assert texts(table) == [["method", "alpha"], ["CE", None], ["ISDA", "0.5"]]
    assert common == "lr 0.1"


def test_arms_are_in_the_order_of_their_numbers():
    rates = (0.5, 10, 9)
    runs = [record("ce", settings={"method": "ce", "lr": rate}) for rate in rates]
    assert [v.label for v in variants_of(runs)] == ["CE (lr 0.5)", "CE (lr 9)", "CE (lr 10)"]


def test_a_seed_that_comes_twice_is_named():
    with pytest.raises(ValueError, match="one record for each seed .* got seed 3 more than once"):
        variants_of([record("ce", 1), record("ce", 3), record("ce", 3)])


def test_corruptions_have_means_over_severities_and_leads_by_seed():
    def found(seed, plus):
        rows = {"fog": [0.5 + plus, 0.25 + plus], "snow": [0.75 + plus] * 2}
        mean = (0.5 + 0.25 + 1.5) / 4 + plus
        return {"corruptions": {"source": "made", "clean": 0.875, "accuracy": rows, "mean": mean}}

    ce = [record("ce", seed, **found(seed, 0.0)) for seed in (0, 1)]
    leads = (0.05, 0.1)
    ours = [record("meta-iada", seed, **found(seed, leads[seed])) for seed in (1, 0)]
    gap = stats.ttest_1samp(leads, 0)
    low, high = (100 * edge for edge in gap.confidence_interval(0.95))
    lead = f"+{(low + high) / 2:.1f} ± {(high - low) / 2:.1f} (p {gap.pvalue:.3f})"
    assert texts(corruption_table(variants_of([*ce, *ours]))) == [
        ["corruption", "CE", "META-IADA"],
        ["none", "87.5 ± 0.0", "87.5 ± 0.0"],
        ["mean", "56.2 ± 0.0", "63.7 ± 3.5"],
        ["mean: META-IADA less this, paired", lead, None],
        ["fog", "37.5 ± 0.0", "45.0 ± 3.5"],
        ["snow", "75.0 ± 0.0", "82.5 ± 3.5"],
    ]
    assert len(corruption_table(variants_of([*ce[:1], *ours])).rows) == 4  # one seed in common


def test_what_a_run_was_tested_on_and_whether_its_labels_are_right():
    assert part_tested_on({"split": {"from": {"test": "validation"}}}) == "validation"
    assert part_tested_on({"split": {"from": {"test": "test"}}}) == part_tested_on({}) == "test"
    assert is_noisy({"split": {"scenario": "noise"}})
    assert is_noisy({"epsilon": {"share_flipped": 0.0}})
    assert not is_noisy({"split": {"scenario": "long-tail"}, "epsilon": {"share_flipped": None}})
