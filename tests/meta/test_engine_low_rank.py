"""Meta-IADA with a low-rank covariance: Eq. 9 by the diagonal and the factors."""

from dataclasses import replace

import pytest
import torch

import iada
from iada.experiments.diagnostics import spectrum
from iada_kernels import reference, torch_ops
from iada_kernels.low_rank import unpacked
from iada_kernels.torch_ops import low_rank
from tests.helpers.engine_cases import hypergradients, make_batches, make_engine, relative
from tests.helpers.problems import assert_same, random_problem
from tests.kernels.test_hypergradient import SIZES, by_reference, present, tangents_of

pytestmark = pytest.mark.usefixtures("one_thread")


def by_torch_ops(problem, tangents):
    """Into a tensor of zeros, and as a step of Σ itself, of another scale."""
    inputs, options = problem.records()
    sigma = inputs.covariance.clone()
    epsilon, sums = torch_ops.hypergradient(
        inputs._replace(covariance=sigma), options, tangents, True
    )
    grad = torch.zeros_like(sigma)
    torch_ops.covariance_step(grad, inputs.weight, tangents.weight, sums, 1.0)
    torch_ops.covariance_step(sigma, inputs.weight, tangents.weight, sums, 0.7)
    stepped = (sigma - inputs.covariance) / 0.7
    return [present(epsilon=epsilon, covariance=moved) for moved in (grad, stepped)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("counted", [True, False])
def test_closed_forms_equal_the_definition(size, rank, counted, monkeypatch, block_elements):
    if not counted:  # as on accelerators, where a class may have several rows
        monkeypatch.setattr(low_rank, "counts_classes", lambda labels: False)
    problem = random_problem(*size, structure="low-rank", rank=rank)
    tangents = tangents_of(problem)
    expected = by_reference(problem, tangents)
    for elements in (1, 2**20):
        block_elements(elements)
        for found in by_torch_ops(problem, tangents):
            assert_same(found, expected)


def test_the_definition_is_the_derivative_of_the_full_one():
    """∂L̇/∂d is the diagonal of ∂L̇/∂Σ, and ∂L̇/∂U = 2 (∂L̇/∂Σ) U."""
    problem = random_problem(7, 4, 5, structure="low-rank", rank=2)
    tangents, parts = tangents_of(problem), unpacked(problem.covariance, 5)
    own = unpacked(by_reference(problem, tangents)["covariance"], 5)
    dense = replace(problem, covariance=parts.dense())
    _, by_sigma = reference.hypergradient(*dense.records(), tangents)
    torch.testing.assert_close(own.diagonal, by_sigma.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(own.factors, 2 * by_sigma @ parts.factors)


WAYS = ("jvp", "double-backward")


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("scope", ["full", "head"])
@pytest.mark.parametrize("weighted", [False, True])
def test_jvp_equals_double_backward(name, scope, weighted):
    options = {"class_weights": torch.tensor([0.5, 1.0, 2.0])} if weighted else {}
    engines = [
        make_engine(name, "low-rank", hypergradient=way, scope=scope, **options) for way in WAYS
    ]
    errors = relative(*(hypergradients(engine, *make_batches(name)) for engine in engines))
    assert max(errors.values()) < 1e-8, errors


def test_a_step_of_eq_9_for_eq_10_alone():
    losses, streamed = [], []
    for way in WAYS:
        engine = make_engine(
            "conv", "low-rank", hypergradient=way, persistent=False, covariance_lr=10.0
        )
        losses.append(engine.step(*make_batches("conv")).loss)
        streamed.append(engine.covariance.covariance)
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    assert torch.equal(*streamed)


def test_eq_9_leaves_a_covariance():
    """With a rate far too large: the diagonal stays at 0 or above; what went back is counted."""
    for options in ({"keep_semidefinite": True}, {"project": True}):
        engine = make_engine("mlp", "low-rank", covariance_lr=1e4, **options)
        engine.step(*make_batches())
        state = engine.covariance
        assert (state.low_rank.diagonal >= 0).all()
        assert (spectrum(state) >= -1e-9 * state.dense().abs().max()).all()
        assert engine.held + engine.projections > 0
        assert torch.isfinite(engine.covariance_change)


def test_settings_reach_the_covariance():
    data = iada.TensorData(torch.randn(24, 6), torch.arange(24) % 3)
    for method in ("meta-iada", "metasaug", "isda"):
        settings = {"method": method, "structure": "low-rank", "rank": 2}
        shared = {"epochs": 2, "ce_epochs": 1, "milestones": (), "batch_size": 8, "lr": 0.01}
        config = iada.TrainerConfig.from_settings({**settings, **shared})
        backbone = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh())
        trainer = iada.Trainer(backbone, torch.nn.Linear(5, 3), data, data, config)
        trainer.fit()
        assert trainer.method.covariance.low_rank.factors.shape == (3, 5, 2)
        assert trainer.method.covariance.covariance.any()
    with pytest.raises(ValueError, match="^rank: expected"):
        iada.TrainerConfig.from_settings({**settings, "rank": -1})
