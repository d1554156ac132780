"""One iteration of Algorithm 1, and the characteristics it runs on."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iada
from iada.nn.projection import nearest_positive_semidefinite, semidefinite_or_former
from tests.helpers.engine_cases import eq_10_by_hand
from tests.helpers.problems import reference_loss_of_head

COUNTS = torch.tensor([40, 20, 10])


def make_meta(structure="full", backbone=None, **options):
    torch.manual_seed(0)
    backbone = backbone or nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
    backbone, head = backbone.double(), nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(
        [
            {"params": list(backbone.parameters()), "lr": 0.1},
            {"params": list(head.parameters()), "lr": 0.3},
        ],
        lr=0.1,
        momentum=0.9,
    )
    covariance = iada.ClassCovariance(3, 5, structure).double()
    options = {"keep_semidefinite": False} | options  # Eq. 9 as it stands
    return iada.MetaIADA(backbone, head, optimizer, COUNTS, covariance=covariance, **options)


def make_batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    meta_x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return (x, torch.arange(12) % 3), (meta_x, torch.arange(7) % 3)


def meta_loss_by_hand(meta, batch, meta_batch, epsilon, sigma):
    """CE on the meta batch after the virtual step, written with copies and the reference loss."""
    trial = copy.deepcopy(meta.classifier)
    features, _ = trial(batch[0])
    loss = reference_loss_of_head(
        trial.head,
        features,
        batch[1],
        covariance=sigma,
        epsilon=epsilon,
        log_prior=meta.log_prior,
        alpha=meta.alpha,
        beta=meta.beta,
    )
    rates = [0.1] * len(list(trial.backbone.parameters())) + [0.3, 0.3]
    grads = torch.autograd.grad(loss, list(trial.parameters()))
    with torch.no_grad():
        for parameter, grad, rate in zip(trial.parameters(), grads, rates, strict=True):
            parameter -= rate * grad
        return F.cross_entropy(trial(meta_batch[0])[1], meta_batch[1])


class Strengths(nn.Module):
    """Stands for the perturbation network: strengths that are parameters."""

    def __init__(self):
        super().__init__()
        values = torch.linspace(-0.8, 0.8, 12, dtype=torch.float64)
        self.epsilon = nn.Parameter(values)

    def forward(self, characteristics):
        return self.epsilon.clone()


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("hypergradient", ["jvp", "double-backward"])
def test_meta_gradients_equal_finite_differences(structure, hypergradient):
    perturbation = Strengths()
    meta = make_meta(
        structure,
        hypergradient=hypergradient,
        perturbation=perturbation,
        perturbation_optimizer=torch.optim.SGD(perturbation.parameters(), lr=0.0),
        covariance_lr=1e6,  # the change of Σ is its gradient, in all digits
    )
    batch, meta_batch = make_batches()
    before = copy.deepcopy(meta)
    features, _ = before.classifier(batch[0])
    before.covariance.update(features, batch[1])
    sigma, epsilon = before.covariance.covariance, perturbation.epsilon.detach()
    value = meta.step(batch, meta_batch).meta_loss
    grad_epsilon = perturbation.epsilon.grad
    grad_sigma = (sigma - meta.covariance.covariance) / 1e6
    by_hand = meta_loss_by_hand(before, batch, meta_batch, epsilon, sigma)
    torch.testing.assert_close(value, by_hand, rtol=1e-10, atol=0)

    def slope(tensor, place):
        ends = []
        for step in (1e-5, -1e-5):
            moved = tensor.clone()
            moved[place] += step
            parts = (moved, sigma) if tensor is epsilon else (epsilon, moved)
            ends.append(meta_loss_by_hand(before, batch, meta_batch, *parts))
        return (ends[0] - ends[1]) / 2e-5

    for i in range(12):
        assert grad_epsilon[i] == pytest.approx(float(slope(epsilon, i)), rel=1e-4, abs=1e-9)
    for place in itertools.islice(np.ndindex(*sigma.shape), 0, None, 3):
        expected = float(slope(sigma, place))
        assert grad_sigma[place] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_step_follows_algorithm_1():
    meta = make_meta(covariance_lr=10.0)
    batch, meta_batch = make_batches()
    before = copy.deepcopy(meta.classifier.state_dict())
    omega = [p.detach().clone() for p in meta.perturbation.parameters()]
    result = meta.step(batch, meta_batch)
    assert result.loss.shape == ()
    assert result.meta_loss.shape == ()
    assert result.epsilon.shape == (12,)
    assert (result.epsilon.abs() < 1).all()
    assert not result.loss.requires_grad
    assert any(
        not torch.equal(a, b) for a, b in zip(omega, meta.perturbation.parameters(), strict=True)
    )

    # Eq. 10 by hand, from the state before, with the Σ and the strengths that the step ended with.
    trial = make_meta()
    trial.classifier.load_state_dict(before)
    eq_10_by_hand(meta, result, trial.classifier, batch)
    trial.optimizer.step()
    for name, tensor in trial.classifier.state_dict().items():
        torch.testing.assert_close(tensor, meta.classifier.state_dict()[name], msg=name)


def test_batchnorm_statistics_move_once_a_step():
    meta = make_meta()
    batch, meta_batch = make_batches()
    meta.step(batch, meta_batch)
    norm = meta.classifier.backbone[1]
    assert int(norm.num_batches_tracked) == 1


def test_covariance_stays_symmetric_and_transient_leaves_it():
    batch, meta_batch = make_batches()
    kept, fleeting = make_meta(covariance_lr=5.0), make_meta(covariance_lr=5.0, persistent=False)
    plain = iada.ClassCovariance(3, 5).double()
    features, _ = copy.deepcopy(fleeting.classifier)(batch[0])
    plain.update(features, batch[1])
    kept.step(batch, meta_batch)
    fleeting.step(batch, meta_batch)
    sigma = kept.covariance.covariance
    assert torch.equal(sigma, sigma.mT)
    assert not torch.allclose(sigma, plain.covariance)
    torch.testing.assert_close(fleeting.covariance.covariance, plain.covariance)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_projection_is_counted(structure):
    meta = make_meta(structure, covariance_lr=1e5, project=True, keep_semidefinite=True)
    batch, meta_batch = make_batches()
    meta.step(batch, meta_batch)
    sigma = meta.covariance.covariance
    smallest = sigma if structure == "diag" else torch.linalg.eigvalsh(sigma)
    assert smallest.min() >= -1e-9 * smallest.abs().max()
    assert meta.projections > 0
    assert meta.held == 0


def test_projection_keeps_the_bits_of_what_is_semidefinite():
    factor = torch.randn(4, 5, 2)
    covariance = factor @ factor.mT
    covariance = (covariance + covariance.mT) / 2
    projected, changed = nearest_positive_semidefinite(covariance)
    assert torch.equal(projected, covariance)
    assert changed == 0


def test_frozen_parameters_stay_frozen():
    meta = make_meta()
    batch, meta_batch = make_batches()
    first = meta.classifier.backbone[0]
    first.weight.requires_grad_(False)
    before = first.weight.clone()
    meta.step(batch, meta_batch)
    assert torch.equal(first.weight, before)


def test_state_dict_resumes_bit_for_bit():
    batch, meta_batch = make_batches()
    one, other = make_meta(), make_meta()
    one.step(batch, meta_batch)
    other.classifier.load_state_dict(one.classifier.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for meta in (one, other):
        meta.step(batch, meta_batch)
    for a, b in zip(one.classifier.parameters(), other.classifier.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.covariance.covariance, other.covariance.covariance)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda x, y: ((x, y.float()), None), "labels"),
        (lambda x, y: ((x, y + 5), None), "labels"),
        (lambda x, y: ((x, y - 100), None), "labels"),
        (lambda x, y: (None, (x, y + 5)), "labels"),
        (lambda x, y: (None, (x, y.tolist())), "labels"),
        (lambda x, y: (x, None), "batch"),
    ],
)
def test_bad_batches_are_refused_before_anything_changes(spoil, name):
    meta = make_meta()
    batch, meta_batch = make_batches()
    bad, bad_meta = spoil(*batch)
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        meta.step(batch if bad is None else bad, meta_batch if bad_meta is None else bad_meta)
    assert int(meta.covariance.count.sum()) == 0
    assert int(meta.memory.class_counts.sum()) == 0


@pytest.mark.parametrize("hypergradient", ["jvp", "double-backward"])
def test_a_bad_meta_batch_leaves_the_perturbation_network(hypergradient):
    meta = make_meta(hypergradient=hypergradient)
    batch, (meta_x, meta_y) = make_batches()
    with pytest.raises(ValueError, match="^meta_batch: expected a finite cross-entropy"):
        meta.step(batch, (meta_x * float("nan"), meta_y))
    assert all(bool(torch.isfinite(p).all()) for p in meta.perturbation.parameters())
    assert torch.isfinite(meta.covariance.covariance).all()


def test_any_integer_labels():
    one, other = make_meta(), make_meta()
    (x, y), (meta_x, meta_y) = make_batches()
    a = one.step((x, y), (meta_x, meta_y))
    b = other.step((x, y.to(torch.int32)), (meta_x, meta_y.to(torch.uint8)))
    assert torch.equal(a.loss, b.loss)


def test_head_must_be_linear():
    with pytest.raises(ValueError, match=r"^head: expected .*nn\.Linear"):
        iada.MetaIADA(nn.Identity(), nn.Sequential(nn.Linear(5, 3)), None, COUNTS)


@pytest.mark.parametrize("hypergradient", ["jvp", "double-backward"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_covariances_stay_semidefinite(structure, hypergradient):
    literal, kept = (
        make_meta(structure, covariance_lr=1e3, hypergradient=hypergradient, keep_semidefinite=keep)
        for keep in (False, True)
    )
    batches = make_batches()
    smallest = []
    for meta in (literal, kept):
        for _ in range(5):
            meta.step(*batches)
        sigma = meta.covariance.covariance
        values = sigma if structure == "diag" else torch.linalg.eigvalsh(sigma)
        smallest.append(float((values.min(dim=1).values / values.abs().max()).min()))
    assert smallest[0] < -1e-3
    assert smallest[1] > -1e-12
    assert kept.held > 0
    assert literal.held == 0
    kept.unchecked += 1e-3
    literal.load_state_dict(kept.state_dict())
    assert literal.held == kept.held
    assert torch.equal(literal.unchecked, kept.unchecked)


def test_covariances_stay_semidefinite_where_no_bound_of_a_step_is_known(monkeypatch):
    """As on accelerators, which would have to be waited for."""
    for backend in ("native", "torch_ops"):
        monkeypatch.setattr(f"iada_kernels.{backend}.covariance_step_bound", lambda *_: None)
    test_covariances_stay_semidefinite("full", "jvp")


@pytest.mark.parametrize("covariance_lr", [1e-3, 1e4])
def test_a_covariance_more_precise_than_the_head(covariance_lr):
    head = nn.Linear(5, 3)
    backbone, covariance = nn.Linear(6, 5), iada.ClassCovariance(3, 5).double()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    options = {"covariance": covariance, "covariance_lr": covariance_lr}
    meta = iada.MetaIADA(backbone, head, optimizer, COUNTS, **options)
    (x, y), (meta_x, meta_y) = make_batches()
    for _ in range(5):
        meta.step((x.float(), y), (meta_x.float(), meta_y))
    values = torch.linalg.eigvalsh(covariance.covariance)
    assert values.min() > -1e-12 * values.max()
    assert meta.held > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_a_step_within_the_cone_is_taken_as_it_is(rank, dtype):
    """Also by a covariance of low rank, of zeros, and with eigenvalues of many magnitudes."""
    torch.manual_seed(0)
    factor = torch.randn(6, 64, rank, dtype=dtype) * torch.logspace(0, -5, rank, dtype=dtype)
    former = factor @ factor.mT
    former[0] = 0
    inside = former + 1e-3 * (former + torch.eye(64, dtype=dtype))
    inside[0] = 0
    for covariance in (former, inside):
        found, held = semidefinite_or_former(covariance, former)
        assert held == 0
        assert torch.equal(found, covariance)
    outside = former.clone()
    direction = torch.randn(64, dtype=dtype)
    outside[2] -= 0.1 * former[2].trace() * torch.outer(direction, direction)
    outside[3, 5, 5] = torch.nan
    found, held = semidefinite_or_former(outside, former)
    assert held == 2
    assert torch.equal(found, former)
