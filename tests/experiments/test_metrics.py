"""Metrics against scikit-learn and by hand; what is not defined is None, never NaN."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from iada.experiments.metrics import (
    METRICS,
    calibration_error,
    mean_std,
    measure,
    paired,
    paired_by_seed,
    posthoc_predictions,
    reliability_bins,
)
from iada.experiments.report.tables import difference

COUNTS = [500, 101, 100, 20, 19, 3]


def draw(rows=400, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels] += 1.0
    return logits, labels


def hits(pairs, classes):
    """Logits and labels of (true, predicted) pairs."""
    true, predicted = torch.tensor(pairs).T
    return torch.nn.functional.one_hot(predicted, classes).double() * 5, true


def test_agrees_with_scikit_learn():
    logits, labels = draw()
    predicted = logits.argmax(dim=1)
    found = measure(logits, labels, COUNTS)
    recall = sklearn_metrics.recall_score(labels, predicted, average=None)
    want = {
        "top1": sklearn_metrics.accuracy_score(labels, predicted),
        "balanced": sklearn_metrics.balanced_accuracy_score(labels, predicted),
        "precision": sklearn_metrics.precision_score(labels, predicted, average="macro"),
        "many": recall[:2].mean(),
        "medium": recall[2:4].mean(),
        "few": recall[4:].mean(),
    }
    for name, value in want.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-12), name
    assert found.confusion == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert found.group_accuracy is None
    assert found.metrics["worst_group"] is None


def test_post_hoc_adjustment_takes_log_pi_off_the_logits():
    logits, labels = draw()
    predicted = (logits - torch.log(torch.tensor(COUNTS))).argmax(dim=1)
    found = measure(logits, labels, COUNTS).metrics
    assert found["posthoc_top1"] == sklearn_metrics.accuracy_score(labels, predicted)
    want = sklearn_metrics.precision_score(labels, predicted, average="macro", zero_division=0)
    assert found["posthoc_precision"] == pytest.approx(want, abs=1e-12)
    assert found["posthoc_top1"] != found["top1"]
    assert measure(logits, labels, [0, *COUNTS[1:]]).metrics["posthoc_top1"] is not None


def test_post_hoc_adjustment_by_hand():
    """A class without training images is taken to have one; large logits lose no digits."""
    logits = torch.tensor([[0.0, 0.5], [0.0, 0.7]])  # log 2 is 0.693
    for counts in ([1, 2], [0, 2]):
        assert posthoc_predictions(logits, torch.tensor(counts)).tolist() == [0, 1]
    large = torch.tensor([[1e8, 1e8]])  # float32's neighbours are 8 apart
    assert posthoc_predictions(large, torch.tensor([2, 1])).tolist() == [1]


def test_precision_is_over_the_classes_that_have_samples():
    # Class 1 is never predicted, class 2 is predicted but has no sample, class 3 is neither.
    logits, labels = hits([(0, 0), (0, 0), (0, 2), (1, 0), (1, 0)], 4)
    found = measure(logits, labels, [10, 10, 10, 10])
    assert found.metrics["precision"] == 0.25
    want = sklearn_metrics.precision_score(
        labels, logits.argmax(dim=1), labels=[0, 1], average="macro", zero_division=0
    )
    assert found.metrics["precision"] == want
    assert found.metrics["balanced"] == pytest.approx(1 / 3)  # the mean of 2/3 and 0


def test_what_is_not_defined_is_none_and_json_has_no_nan():
    logits, labels = hits([(0, 0), (1, 0)], 3)
    found = measure(logits, labels, [1000, 200, 5])
    assert found.metrics["few"] is None  # its one class has no test sample
    assert found.metrics["medium"] is None  # there is no such class
    assert found.metrics["many"] == 0.5
    assert set(found.metrics) == set(METRICS)
    json.dumps(found._asdict(), allow_nan=False)


def test_groups_average_and_worst():
    pairs = [(0, 0)] * 6 + [(0, 1)] * 2 + [(1, 1)] * 1 + [(1, 0)] * 1 + [(1, 1)] * 10
    logits, labels = hits(pairs, 2)
    groups = torch.tensor([0] * 8 + [2] * 2 + [3] * 10)
    names = ["land, land", "land, water", "water, land", "water, water"]
    given = {"groups": groups, "group_names": names}
    found = measure(logits, labels, [50, 50], **given, group_counts=[3498, 0, 56, 1057])
    assert found.group_accuracy == {
        "land, land": 0.75,
        "land, water": None,
        "water, land": 0.5,
        "water, water": 1.0,
    }
    assert found.metrics["average"] == 17 / 20
    assert found.metrics["worst_group"] == 0.5
    want = (3498 * 0.75 + 56 * 0.5 + 1057 * 1.0) / (3498 + 56 + 1057)
    assert found.metrics["weighted_average"] == pytest.approx(want, abs=1e-15)
    found = measure(logits, labels, [50, 50], **given, group_counts=[3498, 184, 56, 1057])
    assert found.metrics["weighted_average"] is None  # a share of it was not tested
    assert found.metrics["average"] == 17 / 20


def test_groups_without_names_and_of_one_training_image():
    logits, labels = hits([(0, 0), (0, 1), (1, 1)], 2)
    groups = torch.tensor([0, 0, 2])
    found = measure(logits, labels, [2, 2], groups=groups, group_counts=[3, 0, 1])
    assert found.group_accuracy == {"0": 0.5, "1": None, "2": 1.0}
    assert found.metrics["weighted_average"] == (3 * 0.5 + 1 * 1.0) / 4


@pytest.mark.parametrize("classes", [2, 6])
def test_calibration_error_is_its_definition(classes):
    logits, labels = draw(classes=classes, seed=3)
    p = logits.double().softmax(dim=1).numpy()
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels.numpy()
    edges = np.linspace(0, 1, 16)
    want = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            want += inside.mean() * gap
    assert calibration_error(logits, labels) == pytest.approx(want, abs=1e-12)
    assert want > 0.01


def test_calibration_error_of_certainty():
    logits, labels = hits([(0, 0), (1, 1), (1, 0), (0, 0)], 2)
    assert calibration_error(1000 * logits, labels) == 0.25


def test_a_bin_has_its_upper_edge():
    logits = torch.tensor([[0.0, 0.0], [0.0, 1000.0]])  # sure by ½ and by 1
    assert reliability_bins(logits, torch.tensor([0, 0]), bins=2) == {
        "count": [1, 1],
        "confidence": [0.5, 1.0],
        "accuracy": [1.0, 0.0],
    }


def test_half_precision_logits_and_any_label_type():
    logits, labels = draw()
    whole = measure(logits.bfloat16(), labels.to(torch.uint8), torch.tensor(COUNTS))
    same = measure(logits.bfloat16().float(), labels, COUNTS)
    assert whole == same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, "logits: expected"),
        ({"logits": torch.full((4, 3), torch.nan)}, "logits: expected finite numbers"),
        ({"logits": torch.zeros(0, 3), "labels": torch.zeros(0).long()}, "at least one row"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels: expected class indices in"),
        ({"class_counts": [1, 2]}, "class_counts: expected"),
        ({"groups": torch.tensor([0, 1, 2, 5]), "group_names": ["a", "b"]}, "groups: expected"),
        ({"groups": torch.tensor([0, 1, 1, -1])}, "groups: expected"),
        ({"groups": torch.zeros(3).long()}, "groups: expected"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "logits": torch.zeros(4, 3),
        "labels": torch.tensor([0, 1, 2, 0]),
        "class_counts": [5, 5, 5],
    } | change
    with pytest.raises(ValueError, match=message):
        measure(
            arguments.pop("logits"),
            arguments.pop("labels"),
            arguments.pop("class_counts"),
            **arguments,
        )


def test_mean_and_deviation_over_seeds():
    records = [
        {"last": {"top1": 0.8, "few": None}, "best": {"top1": 0.82}},
        {"last": {"top1": 0.7, "few": 0.5}, "best": {"top1": 0.76}},
    ]
    found = mean_std(records)
    assert found["last"]["top1"].mean == pytest.approx(0.75)
    assert found["last"]["top1"].std == pytest.approx(np.std([0.8, 0.7], ddof=1))
    assert found["best"]["top1"].mean == pytest.approx(0.79)
    assert found["last"]["few"] == (0.5, None, 1)
    assert "ece" not in found["last"]
    assert mean_std([])["best"] == {}


def test_likelihood_and_reliability():
    logits, labels = draw()
    found = measure(logits, labels, COUNTS)
    probability = logits.double().softmax(dim=1)
    want = sklearn_metrics.log_loss(labels, probability, labels=range(6))
    assert found.metrics["nll"] == pytest.approx(want, abs=1e-12)
    bins = found.reliability
    assert sum(bins["count"]) == len(labels)
    gaps = [
        count * abs(accuracy - confidence)
        for count, accuracy, confidence in zip(
            *(bins[n] for n in ("count", "accuracy", "confidence")), strict=True
        )
        if count
    ]
    assert sum(gaps) / len(labels) == pytest.approx(found.metrics["ece"], abs=1e-12)
    assert bins["accuracy"][0] is None  # none is less sure than one of six
    json.dumps(bins)


def test_paired_differences_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    scores = {"a": [0.7, 0.8, 0.75, 0.9], "b": [0.6, 0.78, 0.7, 0.8]}
    one, other = (
        [{"seed": seed, "last": {"top1": value}} for seed, value in enumerate(values)]
        for values in scores.values()
    )
    found = paired(one, other[::-1], "top1")
    assert found.mean == pytest.approx(np.mean(scores["a"]) - np.mean(scores["b"]))
    assert found.p == pytest.approx(stats.ttest_rel(scores["a"], scores["b"]).pvalue)
    gap = stats.ttest_rel(scores["a"], scores["b"])
    low, high = gap.confidence_interval(0.95)
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high))
    back = paired(other, one, "top1")
    assert (-back.mean, back.margin, back.p) == pytest.approx(found[:3])
    assert paired(one[:3], [*other[1:], {"seed": 9, "last": {}}], "top1").seeds == 2
    assert paired(one[:1], other, "top1") == (pytest.approx(0.1), None, None, 1)
    assert paired(one[:1], other[1:], "top1") is None
    assert paired(one, one, "top1") == (0.0, 0.0, 1.0, 4)


def test_differences_that_are_all_the_same_have_no_p():
    pytest.importorskip("scipy.stats")
    scores = [0.1, 0.7, 0.4]
    one, other = (
        [{"seed": seed, "last": {"top1": value + more}} for seed, value in enumerate(scores)]
        for more in (0.05, 0.0)
    )
    found = paired(one, other, "top1")
    assert (found.mean, found.margin, found.p) == (pytest.approx(0.05), 0.0, None)


def test_differences_of_rounding_alone_are_none():
    ours = dict(enumerate([0.3, 0.1 + 0.2, 0.3, 0.5]))
    theirs = dict(enumerate([0.1 + 0.2, 0.3, 0.1 + 0.2, 0.5]))
    found = paired_by_seed(ours, theirs)
    assert 0 < -found.mean < 1e-16
    assert found[1:] == (0.0, 1.0, 4)


def test_without_scipy_there_is_no_interval(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr("iada.experiments.metrics.import_module", absent)
    found = paired_by_seed({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.25})
    assert found == (0.375, None, None, 2)
    assert difference("top1", found) == "+37.5"
