"""Features that ε moves, their neighbours, and images that are made to have them."""

import numpy as np
import pytest
import torch
from torch import nn

from iada.experiments.datasets import Labelled
from iada.experiments.diagnostics.inversion import invert, total_variation
from iada.experiments.diagnostics.moved_features import class_radii, moved_features, neighbours
from iada.experiments.moved_record import CLASSES, chosen_rows
from iada.models import build_backbone
from iada_kernels.low_rank import LowRankCovariance
from iada_kernels.reference import perturbation_sign
from tests.helpers.problems import random_problem


def a_problem(structure="full", **options):
    return random_problem(9, 4, 5, structure=structure, ignored=0.0, **options)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_moved_by_the_sign_of_the_gradient(structure):
    p = a_problem(structure)
    given, drawn = moved_features(p.records()[0], alpha=0.5, draws=3)
    assert drawn.shape == (9, 3, 5)
    torch.testing.assert_close(given[:, 0], p.features)
    sign = perturbation_sign(p.features @ p.weight.T + p.bias, p.weight, p.labels)
    torch.testing.assert_close(given[:, 1], p.features + p.epsilon[:, None] * sign)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_drawn_with_the_class_covariance(structure):
    p = a_problem(structure)
    inputs = p.records()[0]
    given, drawn = moved_features(inputs, alpha=0.3, draws=40_000, seed=1)
    for row in range(3):
        around = drawn[row] - given[row, 1]
        sigma = p.covariance[p.labels[row]]
        sigma = 0.3 * (sigma if structure == "full" else torch.diag(sigma))
        size = float(sigma.diagonal().max())
        torch.testing.assert_close(around.T.cov(), sigma, atol=0.05 * size, rtol=0)
        assert around.mean(dim=0).abs().max() < 0.05 * size**0.5
    repeated, other = (moved_features(inputs, alpha=0.3, draws=5, seed=s)[1] for s in (2, 3))
    assert torch.equal(repeated, moved_features(inputs, alpha=0.3, draws=5, seed=2)[1])
    assert not torch.equal(repeated, other)


def test_low_rank_is_the_matrix_it_stands_for():
    p = a_problem()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, 5, 2, generator=generator, dtype=p.features.dtype)
    low_rank = LowRankCovariance(torch.ones_like(factors[:, :, 0]), factors)
    inputs = p.records()[0]
    found = [
        moved_features(inputs._replace(covariance=sigma), alpha=0.5)[1]
        for sigma in (low_rank.packed(), low_rank.dense())
    ]
    torch.testing.assert_close(*found)
    radii = class_radii(low_rank.packed(), 5)
    torch.testing.assert_close(radii, class_radii(low_rank.dense(), 5))
    torch.testing.assert_close(radii, low_rank.variances().sum(dim=1).sqrt())


def test_a_negative_eigenvalue_is_no_direction():
    p = a_problem()
    sigma = torch.diag(torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0], dtype=p.features.dtype))
    inputs = p.records()[0]._replace(covariance=sigma.expand(4, 5, 5))
    given, drawn = moved_features(inputs, alpha=1.0)
    around = drawn - given[:, 1:]
    assert around[..., 0].abs().min() > 0
    assert torch.equal(around[..., 1:], torch.zeros_like(around[..., 1:]))


@pytest.mark.parametrize("name", ["covariance", "epsilon"])
def test_without_it_nothing_is_moved(name):
    inputs = a_problem().records()[0]._replace(**{name: None})
    with pytest.raises(ValueError, match=f"{name}: expected that of the training"):
        moved_features(inputs, alpha=0.5)


def test_neighbours_are_others():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [10.0, 0.0]])
    targets = torch.tensor([[0.0, 0.0], [2.5, 0.0]])
    found = neighbours(features, targets, torch.tensor([0, 0]), 2)
    assert found.rows.tolist() == [[1, 2], [2, 1]]
    assert found.distances.tolist() == [[1, 3], [0.5, 1.5]]
    assert found.own_distance.tolist() == [0, 2.5]
    assert found.own_rank.tolist() == [0, 2]
    with pytest.raises(ValueError, match="count: expected 1 to 3"):
        neighbours(features, targets, torch.tensor([0, 0]), 4)


def test_neighbours_are_told_apart_far_from_the_origin():
    features = 1e4 + torch.tensor([[0.0], [1e-2], [3e-2]]).double()
    found = neighbours(features, features[:1], torch.tensor([0]), 1)
    assert float(found.distances) == pytest.approx(1e-2, rel=1e-6)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone("resnet8", 3)[0]


def normalise(values):
    return (values - 0.45) / 0.25


def test_inversion_comes_near_and_leaves_the_backbone_alone(backbone):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((3, 3, 8, 8), dtype=np.float32))
    backbone.eval()
    targets = backbone(normalise(images)).detach()
    backbone.train()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = invert(backbone, targets, (3, 8, 8), normalise, steps=60)
    assert found.images.shape == images.shape
    assert not found.images.requires_grad
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert (found.residual < 0.5 * found.start).all()
    assert backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, state[n]) for n, value in backbone.state_dict().items())
    backbone.eval()
    off = (backbone(normalise(found.images)) - targets).norm(dim=1)
    torch.testing.assert_close(off, found.residual)
    again = invert(backbone, targets, (3, 8, 8), normalise, steps=60)
    assert torch.equal(again.images, found.images)


def test_the_prior_makes_images_smooth(backbone):
    targets = backbone.eval()(normalise(torch.rand(2, 3, 8, 8))).detach()
    rough, smooth = (
        invert(backbone, targets, (3, 8, 8), normalise, steps=40, smoothness=(weight, weight))
        for weight in (1e-3, 10.0)
    )
    assert (total_variation(smooth.images) < 0.5 * total_variation(rough.images)).all()


def test_what_cannot_be_had_has_a_residual():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    targets = torch.tensor([[-3.0, 0.5, 0.5, -4.0]])
    found = invert(model, targets, (1, 2, 2), lambda values: values, steps=300)
    assert float(found.residual) >= 5
    assert float(found.residual) < 5.3  # the prior has its share


def test_errors_of_an_inversion(backbone):
    with pytest.raises(ValueError, match="targets: expected features"):
        invert(backbone, torch.zeros(0, 64), (3, 8, 8), normalise)
    with pytest.raises(ValueError, match="steps"):
        invert(backbone, torch.zeros(1, 64), (3, 8, 8), normalise, steps=0)
    with pytest.raises(ValueError, match="smoothness: expected weights above 0"):
        invert(backbone, torch.zeros(1, 64), (3, 8, 8), normalise, smoothness=(1.0, 0.0))


def test_samples_of_large_and_small_classes():
    counts = [5, 9, 3, 1, 7, 2]
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    data = Labelled(images, labels, tuple("abcdef"))
    epsilon = torch.linspace(-1, 1, len(labels), dtype=torch.float64)
    epsilon[labels == 1] = torch.nan  # not visited: the class is passed over
    epsilon[labels.tolist().index(4)] = torch.nan
    rows = chosen_rows(epsilon, data)
    assert labels[rows].tolist() == [4, 4, 0, 0, 5, 5, 3]
    assert not epsilon[rows].isnan().any()
    for c in (4, 0, 5):
        known = epsilon[(labels == c) & ~epsilon.isnan()]
        assert epsilon[rows][labels[rows] == c].tolist() == [known.max(), known.min()]
    assert len(set(labels[rows].tolist())) == CLASSES
    with pytest.raises(ValueError, match="epsilon"):
        chosen_rows(torch.full_like(epsilon, torch.nan), data)
