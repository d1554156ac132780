"""What a run's record says of the trained classifier."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import iada
from iada.experiments import run
from iada.experiments.datasets import Labelled
from iada.experiments.diagnostics import surrogate_gap
from iada.experiments.metrics import METRICS, Measured
from iada.experiments.outcome import (
    GAP_ROWS,
    covariance_diagnostics,
    curve,
    goodness,
    judge_of,
    last_and_best,
    measured_on,
)
from iada.utils.evaluate import Outputs
from iada_kernels.contract import LossInputs


def test_the_surrogate_is_recorded_at_the_epsilon_of_training():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(4)
    features = torch.randn(12, 5)
    head = nn.Linear(5, 3)
    covariance = iada.ClassCovariance(3, 5)
    covariance.update(features, labels)
    method = SimpleNamespace(covariance=covariance, head=head, alpha=0.5)
    method.seen_by_loss = lambda h, y: (h, covariance.covariance)

    def outputs(data, rows):
        return Outputs(features[rows], head(features[rows]).detach(), labels[rows])

    trainer = SimpleNamespace(method=method, outputs=outputs)
    data = iada.TensorData(features, labels)
    epsilon = torch.full((12,), 0.5, dtype=torch.float64)
    epsilon[0] = torch.nan  # not visited: as without a perturbation
    bounds = [
        covariance_diagnostics(trainer, data, given)["surrogate"]["bound"]
        for given in (None, epsilon, torch.zeros(12, dtype=torch.float64))
    ]
    assert all(moved > plain for plain, moved in zip(bounds[0], bounds[1], strict=True))
    assert bounds[2] == pytest.approx(bounds[0])
    method.covariance = None
    assert covariance_diagnostics(trainer, data, epsilon)["surrogate"] is None


@pytest.mark.parametrize(("metric", "best"), [("nll", 1), ("ece", 1), ("top1", 2)])
def test_the_best_epoch_is_that_of_the_smallest_loss_and_of_the_largest_share(metric, best):
    shares = {"nll": (2.3, 0.4, 0.9), "ece": (0.3, 0.1, 0.2), "top1": (0.1, 0.8, 0.9)}[metric]
    history = [{"epoch": 0}]
    history += [{"epoch": e, f"test_{metric}": v} for e, v in enumerate(shares)]
    recipe = SimpleNamespace(metrics=(metric,))
    found = last_and_best(history, recipe, Measured({}, [], None, {}))
    assert (found["best_epoch"], found["best_by"]) == (best, f"test_{metric}")
    assert found["best"] == {metric: shares[best]}
    assert goodness(f"test_{metric}", None) < goodness(f"test_{metric}", shares[0])


def test_of_equally_good_epochs_the_first_is_the_best():
    """As the weights that are kept are those of an epoch that none before was as good as."""
    history = [{"epoch": e, "test_top1": v} for e, v in enumerate((0.5, 0.75, 0.75))]
    found = last_and_best(history, SimpleNamespace(metrics=("top1",)), Measured({}, [], None, {}))
    assert found["best_epoch"] == 1


@pytest.mark.parametrize(("value", "kept"), [(0.75, False), (0.8, True), (None, False)])
def test_weights_are_kept_of_an_epoch_that_none_was_as_good_as(tmp_path, monkeypatch, value, kept):
    saved = []
    monkeypatch.setattr(run, "save_weights", lambda *arguments: saved.append(arguments))
    history = [{"test_top1": 0.5}, {"test_top1": 0.75}, {}]
    trainer = SimpleNamespace(history=history, epoch=3, backbone="b", head="h")
    recipe, options = SimpleNamespace(metrics=("top1",)), SimpleNamespace(folder=tmp_path)
    planned = SimpleNamespace(recipe=recipe, options=options)
    run._keep_best(trainer, planned, {"test_top1": value})
    assert saved == [(tmp_path / run.BEST, "b", "h", 4, {"test_top1": value})] * kept


def test_what_the_best_epoch_is_chosen_by():
    groups = SimpleNamespace(metrics=("average", "worst_group"))
    classes = SimpleNamespace(metrics=("top1", "precision"))
    validated = [{}, {"validation_worst_group": 0.5, "validation_precision": 0.5}]
    assert judge_of(groups, validated) == "validation_worst_group"
    assert judge_of(groups, [{"test_worst_group": 0.5}]) == "test_worst_group"
    assert judge_of(classes, validated) == "test_top1"


def test_a_curve_has_the_mean_over_classes_and_the_terms_of_its_epochs():
    terms = SimpleNamespace(summary=lambda: [{"epoch": 1, "fairness": 0.25}])
    history = [
        {"epoch": 0, "loss": 2.0, "test_balanced": 0.5, "test_top1": 0.75},
        {"epoch": 1, "loss": 1.0, "covariance_change": 0.125},
    ]
    assert curve(history, terms) == [
        {"epoch": 0, "loss": 2.0, "accuracy": 0.5},
        {"epoch": 1, "loss": 1.0, "accuracy": None, "covariance_change": 0.125, "fairness": 0.25},
    ]


def test_the_surrogate_is_that_of_rows_from_all_of_the_data():
    torch.manual_seed(0)
    count = GAP_ROWS * 3 // 2
    labels, features = torch.arange(count) % 3, torch.randn(count, 4)
    head, covariance = nn.Linear(4, 3), iada.ClassCovariance(3, 4)
    covariance.update(features, labels)
    method = SimpleNamespace(covariance=covariance, head=head, alpha=0.25)
    method.seen_by_loss = lambda h, y: (h, covariance.covariance)
    given = lambda data, rows: Outputs(features[rows], head(features[rows]), labels[rows])  # noqa: E731
    epsilon = torch.rand(count, dtype=torch.float64)
    epsilon[3] = torch.nan
    trainer = SimpleNamespace(method=method, outputs=given)
    found = covariance_diagnostics(trainer, iada.TensorData(features, labels), epsilon)
    rows = torch.tensor([row for row in range(count) if row % 3 < 2])  # two of three
    assert len(rows) == GAP_ROWS
    strengths = epsilon.nan_to_num(0.0)[rows].float()
    weight, bias = head.weight.detach(), head.bias.detach()
    parts = (features[rows], weight, bias, labels[rows], covariance.covariance, strengths)
    want = surrogate_gap(LossInputs(*parts), alpha=0.25, samples=200)
    assert found["surrogate"] == want.as_record()


def outcome_on(data, train, predicted, wrong=None, **options):
    logits = 5.0 * nn.functional.one_hot(torch.tensor(predicted), data.num_classes)
    trainer = SimpleNamespace(outputs=lambda view: Outputs(logits, logits, data.labels))
    return measured_on(trainer, None, data, SimpleNamespace(train=train, wrong=wrong), **options)


def test_no_class_is_rare_by_labels_that_are_wrong():
    train = Labelled(
        torch.zeros(129, 1), torch.tensor([0] * 101 + [1] * 20 + [2] * 8), tuple("abc")
    )
    test = Labelled(torch.zeros(4, 1), torch.tensor([0, 1, 1, 2]), tuple("abc"))
    plain = outcome_on(test, train, [0, 1, 0, 1])
    shots = {"many": 1.0, "medium": 0.5, "few": 0.0}
    assert {name: plain.metrics[name] for name in shots} == shots
    wrong = torch.zeros(129, dtype=torch.bool)
    for found in (
        outcome_on(test, train, [0, 1, 0, 1], wrong),
        outcome_on(test, train, [0, 1, 0, 1], trusted=False),
    ):
        assert found.metrics == {**plain.metrics, **dict.fromkeys(shots)}
        assert found[1:] == plain[1:]


def test_the_worst_group_is_of_sets_that_overlap_where_there_are_any():
    """Groups weigh by their training samples; sets of samples do not add up to anything."""
    labels, names = torch.tensor([0, 0, 1, 1]), ("no", "yes")
    kinds = {"groups": labels, "group_names": ("g0", "g1")}
    train = Labelled(["text"] * 4, torch.tensor([0, 0, 0, 1]), names)
    train = replace(train, **{**kinds, "groups": train.labels})
    test = Labelled(["text"] * 4, labels, names, **kinds)
    grouped = outcome_on(test, train, [0, 0, 1, 0])
    assert grouped.group_accuracy == {"g0": 1.0, "g1": 0.5}
    assert grouped.metrics["weighted_average"] == (3 * 1.0 + 1 * 0.5) / 4
    members = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]).bool()
    test = replace(test, members=members, member_names=("first", "second", "none"))
    found = outcome_on(test, train, [0, 0, 1, 0])
    assert found.group_accuracy == {"first": 1.0, "second": 2 / 3, "none": None}
    assert found.metrics["worst_group"] == 2 / 3
    assert found.metrics["weighted_average"] is None
    assert found.metrics["average"] == found.metrics["top1"] == 0.75
    assert set(found.metrics) == set(METRICS)
