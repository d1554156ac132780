"""ε as a detector of wrong labels, against scikit-learn."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import iada
from iada.experiments.epsilon_log import EpsilonLog
from iada.experiments.outcome import epsilon_record
from iada.meta.method import MetaStep
from iada.training.label_issues import detection, label_issues
from tests.helpers.training import make_trainer


@pytest.mark.parametrize("levels", [3, 1000])  # with and without equal values
def test_detection_is_scikit_learns(levels):
    generator = torch.Generator().manual_seed(levels)
    wrong = torch.rand(200, generator=generator) < 0.3
    epsilon = torch.randint(levels, (200,), generator=generator) / levels - 0.4 * wrong
    found = detection(epsilon, wrong)
    assert found["auroc"] == pytest.approx(roc_auc_score(wrong, -epsilon), abs=1e-12)
    wanted = average_precision_score(wrong, -epsilon)
    assert found["average_precision"] == pytest.approx(wanted, abs=1e-12)
    assert found["base_rate"] == pytest.approx(float(wrong.double().mean()))
    if levels == 1000:
        count = int(wrong.sum())
        first = wrong[label_issues(epsilon).indices[:count]].double().mean()
        assert found["precision"] == pytest.approx(float(first), abs=1 / count)


def test_what_equal_values_are_worth():
    same = detection(torch.zeros(10), torch.arange(10) < 4)
    assert same == {"auroc": 0.5, "average_precision": 0.4, "precision": 0.4, "base_rate": 0.4}
    clear = detection(
        torch.tensor([0.5, -0.5, 0.2, -0.1]), torch.tensor([False, True, False, True])
    )
    assert (clear["auroc"], clear["average_precision"], clear["precision"]) == (1.0, 1.0, 1.0)


def test_samples_that_were_not_visited_are_left_out():
    epsilon = torch.tensor([torch.nan, -0.5, 0.5])
    assert label_issues(epsilon).indices.tolist() == [1, 2, 0]
    assert detection(epsilon, torch.tensor([True, True, False]))["auroc"] == 1.0
    assert detection(epsilon, torch.tensor([True, False, False])) is None
    with pytest.raises(ValueError, match="wrong: expected bool"):
        detection(epsilon, torch.tensor([1, 0, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": [torch.nan, torch.nan]}, "epsilon: expected .* got NaN for all; leave it out"),
        ({"epsilon": [0.5, -0.5], "loss": [torch.nan] * 2}, "loss: expected .* got NaN for all"),
        ({"epsilon": [0.0, torch.nan]}, "epsilon: expected strengths .* got 0 for all"),
        ({"epsilon": [0.1, 5.0]}, "epsilon: expected strengths, .* 0.1 to 5; pass losses by their"),
    ],
)
def test_what_ranks_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        label_issues(**{name: torch.tensor(values) for name, values in arguments.items()})


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (iada.SampleLog(44, 80), "epochs: expected the run's 6, got 80; build it of this run"),
        (iada.SampleLog(43, 6), "num_samples: expected the run's 44, got 43; build it of this run"),
        (iada.SampleLog(45, 6), "num_samples: expected the run's 44, got 45; build it of this run"),
    ],
)
def test_a_log_made_for_another_run_is_refused_at_the_first_step(log, message):
    trainer = make_trainer(observe=log)
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer.fit()
    assert trainer.batch == 0


def test_a_run_records_it_where_labels_are_known_to_be_wrong():
    labels, wrong = torch.tensor([0, 0, 1]), torch.tensor([True, False, False])
    result = MetaStep(torch.zeros(()), torch.zeros(()), torch.tensor([-0.5, 0.5, -0.7]))
    trainer = type("Run", (), {"epoch": 9, "method": None})
    for noise in (wrong, None):
        log = EpsilonLog(labels, noise, 2, epochs=10)
        assert epsilon_record(log) is None
        log(trainer, (None, labels, torch.arange(3)), result)
        found = epsilon_record(log)["label_issues"]
        assert found == (None if noise is None else detection(result.epsilon, wrong))


def test_a_strength_of_zero_is_not_adversarial():
    labels = torch.tensor([0, 0, 1, 1])
    log = EpsilonLog(labels, torch.tensor([False, True, False, True]), 2, epochs=1)
    epsilon = torch.tensor([0.0, 0.5, 0.5, 0.0])
    trainer = type("Run", (), {"epoch": 0, "method": None})
    step = MetaStep(torch.zeros(()), torch.zeros(()), epsilon)
    log(trainer, (None, labels, torch.arange(4)), step)
    found = log.as_record()
    assert found["class_share"] == [0.5, 0.5]
    assert (found["share_clean"], found["share_flipped"]) == (0.5, 0.5)
    log(trainer, (None, labels[:1], torch.arange(1)), replace(step, epsilon=epsilon[:1]))
    assert log.as_record()["class_share"] == [1 / 3, 0.5]


def test_scores_go_from_0_to_1():
    issues = iada.label_issues(epsilon=torch.tensor([0.5, -0.9, torch.nan, 0.1, 0.1]))
    expected = [0.0, 1.0, torch.nan, 0.5, 0.5]  # of equal ones the mean of ranks 1 and 2, of 3
    torch.testing.assert_close(issues.scores, torch.tensor(expected).double(), equal_nan=True)


@pytest.mark.parametrize(("epochs", "first"), [(1, 0), (2, 1), (5, 4), (200, 160)])
def test_the_last_fifth_of_a_run_is_one_epoch_at_least(epochs, first):
    assert iada.SampleLog(3, epochs).first_epoch == first


def test_large_losses_come_first_and_both_are_ranked_alike():
    """Ranks of ε from its largest, ⅓ of 0, 3, 2 and 1; of losses ⅓ of 3, 1, 2 and 0."""
    epsilon, loss = torch.tensor([0.5, -0.9, 0.1, 0.2]), torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert iada.label_issues(loss=loss).indices.tolist() == [0, 2, 1, 3]
    both = iada.label_issues(epsilon, loss=loss)
    assert both.scores.tolist() == pytest.approx([3 / 6, 4 / 6, 4 / 6, 1 / 6])
    assert both.indices.tolist() == [1, 2, 0, 3]


def test_samples_that_rank_alike_stay_in_order():
    epsilon = torch.arange(300) % 2 - 0.5
    indices = iada.label_issues(epsilon).indices
    assert torch.equal(indices, torch.cat([torch.arange(0, 300, 2), torch.arange(1, 300, 2)]))


@pytest.mark.parametrize("wrong", [False, True])
def test_labels_that_are_all_alike_tell_nothing(wrong):
    assert detection(torch.tensor([0.5, -0.5]), torch.full((2,), wrong)) is None
