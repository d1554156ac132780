"""Covariances shrunk to one that classes share, by how few samples a class has."""

import copy

import pytest
import torch

import iada
from iada_kernels import reference
from tests.helpers.engine_cases import (
    CLASSES,
    eq_10_by_hand,
    hypergradients,
    make_batches,
    make_engine,
    relative,
)
from tests.nn.test_covariance import random_stream

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("structure", ["full", "diag"]),
]


def by_hand(features, labels, classes, shrinkage, structure):
    """From the rows themselves: (1 − λ_c) Σ_c + λ_c S."""
    sigma, _, count = reference.population_statistics(
        features, labels, classes, structure == "diag"
    )
    shared = sum(n * s for n, s in zip(count, sigma, strict=True)) / count.sum()
    rates = [shrinkage / (shrinkage + int(n)) for n in count]
    return torch.stack([(1 - r) * s + r * shared for r, s in zip(rates, sigma, strict=True)])


@pytest.fixture
def stream():
    features, labels = random_stream(60, 4, 5)
    return features, torch.where(labels == 3, 0, labels)  # nobody in class 3


def streamed(stream, structure, shrinkage):
    state = iada.ClassCovariance(4, 5, structure, shrinkage=shrinkage).double()
    for features, labels in zip(*(part.split(13) for part in stream), strict=True):
        state.update(features, labels)
    return state


@pytest.mark.parametrize("shrinkage", [0.5, 20, 1e9])
def test_losses_see_the_shrunk_one(structure, shrinkage, stream):
    features, labels = stream
    state = streamed(stream, structure, shrinkage)
    expected = by_hand(features, labels, 4, shrinkage, structure)
    torch.testing.assert_close(state.shrunk(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.shrunk()[3], state.shrunk(state.covariance)[3])
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def gradient(function, covariance, change=lambda: None):
        options = {"covariance": covariance, "reduction": "none"}  # its backward reads Σ again
        loss = function(features, weight, None, labels, **options)
        change()
        return loss.detach(), *torch.autograd.grad(loss.sum(), [weight])

    for function in (iada.fused_loss, iada.eager_loss):
        other = copy.deepcopy(state)
        found = gradient(function, other, lambda other=other: other.update(features, labels))
        torch.testing.assert_close(found, gradient(function, expected), rtol=1e-9, atol=1e-12)


def test_without_it_the_state_itself_is_seen(structure, stream):
    state = streamed(stream, structure, 0.0)
    assert state.shrunk() is state.covariance
    empty = iada.ClassCovariance(4, 5, structure, shrinkage=3.0)
    assert not empty.shrunk().any()
    assert "shrinkage=3.0" in repr(empty)


def test_the_module_streams_first(structure, stream):
    features, labels = stream
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    criterion = iada.IADALoss(4, 5, structure=structure, shrinkage=7.0).double()
    parts = zip(*(part.split(30) for part in stream), strict=True)
    losses = [criterion(h, weight, None, y) for h, y in parts]
    criterion.eval()
    losses.append(criterion(features, weight, None, labels))
    seen = [by_hand(features[:n], labels[:n], 4, 7.0, structure) for n in (30, 60, 60)]
    rows = slice(0, 30), slice(30, 60), slice(0, 60)
    for loss, sigma, own in zip(losses, seen, rows, strict=True):
        expected = iada.fused_loss(features[own], weight, None, labels[own], covariance=sigma)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for have, want in zip(
            torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight), strict=True
        ):
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


def shrinking(engine, shrinkage=5.0):
    engine.covariance.shrinkage = shrinkage
    return engine


def test_eq_9_moves_the_own_part_by_its_share(structure):
    """Of an engine whose Σ is, in all, what the other one's losses see."""
    batches = make_batches("conv")
    shrunk = shrinking(make_engine("conv", structure))
    found = hypergradients(shrunk, *batches)
    oracle = shrinking(make_engine("conv", structure, hypergradient="double-backward"))
    errors = relative(found, hypergradients(oracle, *batches))
    assert max(errors.values()) < 1e-8, errors

    plain, streamed = make_engine("conv", structure), copy.deepcopy(shrunk.covariance).double()
    streamed.reset()
    torch.manual_seed(5)
    features = copy.deepcopy(plain.classifier.backbone)(batches[0][0]).detach()
    streamed.update(features, batches[0][1])

    def take_in(*_):
        plain.covariance.covariance.copy_(streamed.shrunk())

    plain.covariance.update_gathered = take_in
    torch.manual_seed(5)
    plain.step(*batches)
    moved = (streamed.shrunk() - plain.covariance.covariance) / plain.covariance_lr
    share = streamed.class_share().view(CLASSES, *[1] * (moved.dim() - 1))
    assert (share < 1).all()
    torch.testing.assert_close(found["covariance"], share * moved, rtol=1e-6, atol=1e-12)


def test_eq_10_sees_the_shrunk_one(structure):
    batches = make_batches("conv")
    engine = shrinking(make_engine("conv", structure, covariance_lr=1e-3))
    classifier = copy.deepcopy(engine.classifier)
    result = engine.step(*batches)
    engine.covariance.covariance.copy_(engine.covariance.shrunk())
    eq_10_by_hand(engine, result, classifier, batches[0])


def test_settings_and_refusals(structure):
    data = iada.TensorData(torch.randn(24, 6), torch.arange(24) % 3)
    for method in ("meta-iada", "isda"):
        config = iada.TrainerConfig.from_settings(
            {"method": method, "structure": structure, "shrinkage": 4.0, "epochs": 2}
            | {"ce_epochs": 1, "milestones": (), "batch_size": 8, "lr": 0.01}
        )
        head = torch.nn.Linear(6, 3)
        trainer = iada.Trainer(torch.nn.Identity(), head, data, data, config)
        trainer.fit()
        assert trainer.method.covariance.shrinkage == 4.0
    with pytest.raises(ValueError, match="^shrinkage: expected 0 or more"):
        iada.ClassCovariance(3, 4, structure, shrinkage=-1.0)
    with pytest.raises(ValueError, match="^shrinkage: expected a finite"):
        iada.ClassCovariance(3, 4, structure, shrinkage=float("nan"))
    with pytest.raises(ValueError, match="^shrinkage: expected 0 with structure='low-rank'"):
        iada.ClassCovariance(3, 4, "low-rank", 2, shrinkage=1.0)


def test_terms_are_shown_of_the_shrunk_one(structure):
    """As the method's loss has them: Table 1."""
    meta = make_engine("mlp", structure)
    meta.covariance.shrinkage = 5.0
    meta.step(*make_batches("mlp"))
    _, seen = meta.seen_by_loss(torch.zeros(2, 8), torch.tensor([0, 1]))
    assert torch.equal(seen, meta.covariance.shrunk())
    assert not torch.allclose(seen, meta.covariance.covariance)
