"""What a run's record says of the trained classifier."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import iada
from iada.experiments.metrics import Measured
from iada.experiments.outcome import covariance_diagnostics, goodness, last_and_best
from iada.utils.evaluate import Outputs


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
