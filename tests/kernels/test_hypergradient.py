"""The head's hypergradient: definition against autograd, every backend against the definition."""

import dataclasses

import pytest
import torch

from iada_kernels import reference, select_backend
from iada_kernels.contract import HeadTangents
from tests.helpers.problems import (
    assert_same,
    confident_problem,
    max_norm,
    random_problem,
    sign_argument,
    target_of,
)

pytestmark = pytest.mark.slow

SIZES = [(7, 4, 5), (1, 3, 2), (5, 1, 4), (3, 9, 6), (33, 6, 17), (0, 3, 4), (70, 19, 33)]


def tangents_of(problem, features=True, bias=True):
    generator = torch.Generator().manual_seed(5)

    def like(tensor):
        dtype = torch.promote_types(torch.float32, tensor.dtype)
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return drawn.to(tensor.device, dtype)

    return HeadTangents(
        like(problem.features) if features else None,
        like(problem.weight),
        like(problem.weight[:, 0]) if bias else None,
    )


def by_reference(problem, tangents, sign=None):
    """{"epsilon": ∂L̇/∂ε, "covariance": ∂L̇/∂Σ}, those that there are, in float64."""
    tangents = HeadTangents(*(None if t is None else t.double() for t in tangents))
    epsilon, covariance = reference.hypergradient(*problem.double().records(), tangents, sign)
    return present(epsilon=epsilon, covariance=covariance)


def by_backend(problem, tangents, backend, scale=1.0):
    inputs, options = problem.records()
    passes = select_backend(backend, problem.features.device)
    epsilon, sums = passes.hypergradient(inputs, options, tangents, inputs.covariance is not None)
    if inputs.covariance is None:
        assert sums is None
        return present(epsilon=epsilon)
    covariance = torch.zeros_like(inputs.covariance)
    passes.covariance_step(covariance, inputs.weight, tangents.weight, sums, scale)
    return present(epsilon=epsilon, covariance=covariance)


def present(**tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("structure", ["full", "diag", None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_definition_is_the_derivative_of_the_loss(structure, reduction):
    problem = random_problem(structure=structure, reduction=reduction, symmetric=False)
    tangents, (inputs, options) = tangents_of(problem), problem.records()
    sign = sign_argument(problem).sign()

    def loss(features, weight, bias):
        moved = inputs._replace(features=features, weight=weight, bias=bias)
        return reference.iada_loss(moved, options, sign)

    moving = (problem.features, problem.weight, problem.bias)
    _, expected = torch.func.jvp(loss, moving, tuple(tangents))
    found = reference.directional_derivative(inputs, options, tangents)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", ["full", "diag", None])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backends_equal_the_definition(target, structure, size, reduction):
    problem = random_problem(*size, structure=structure, reduction=reduction).to(target.device)
    tangents = tangents_of(problem)
    assert_same(by_backend(problem, tangents, target.backend), by_reference(problem, tangents))


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("absent", ["features", "bias", "epsilon", "log_prior", "own bias", "rows"])
def test_parts_may_be_absent(target, structure, absent):
    parts = {name: absent != name for name in ("epsilon", "log_prior")}
    problem = random_problem(
        9, structure=structure, bias=absent != "own bias", ignored=absent == "rows", **parts
    ).to(target.device)
    tangents = tangents_of(problem, features=absent != "features", bias=absent != "bias")
    assert_same(by_backend(problem, tangents, target.backend), by_reference(problem, tangents))


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_as_good_as_torch(target, structure, confident, dtype):
    problem = random_problem(65, 11, 24, structure=structure, dtype=torch.float32)
    if confident:  # margins of about 30: 1 − p_y is far below rounding
        rows = torch.arange(65)
        features = problem.features + 3 * problem.weight[target_of(problem)[rows]]
        problem = dataclasses.replace(problem, features=features)
    if dtype == torch.bfloat16:
        problem = dataclasses.replace(problem, features=problem.features.to(dtype))
    problem = problem.to(target.device)
    tangents = tangents_of(problem)
    sign = sign_argument(problem).sign()
    exact = by_reference(problem, tangents, sign)
    single = problem.map(lambda t: t.float())
    epsilon, covariance = reference.hypergradient(*single.records(), tangents, sign.float())
    by_torch = present(epsilon=epsilon, covariance=covariance)
    for name, found in by_backend(problem, tangents, target.backend).items():
        error = max_norm(found.double() - exact[name])
        allowed = 4 * max_norm(by_torch[name].double() - exact[name])
        floor = 2**-22 * max_norm(exact[name])  # a result right to its last digits is right
        assert error <= max(allowed, floor), f"{name}: {error:.2e} against {allowed:.2e} of torch"


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("scale", [75.0, 150.0])
def test_confident_samples_keep_their_digits(target, structure, scale):
    """Where operators of torch lose them: D and c relative to themselves, by the definition."""
    exact = confident_problem(scale, structure, epsilon=True)
    problem = exact.map(torch.Tensor.float).to(target.device)
    tangents = tangents_of(problem)
    wanted = by_reference(exact, HeadTangents(*(None if t is None else t.cpu() for t in tangents)))
    for name, found in by_backend(problem, tangents, target.backend).items():
        error = max_norm(found.cpu().double() - wanted[name]) / max_norm(wanted[name])
        assert error < 16 * torch.finfo(torch.float32).eps * scale, name


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_step_adds_in_place_and_leaves_absent_classes_alone(target, structure, rows):
    problem = random_problem(rows, 8, 6, structure=structure, dtype=torch.float32)
    labels = torch.where(problem.labels > 5, 1, problem.labels)  # nobody in classes 6 and 7
    problem = dataclasses.replace(problem, labels=labels).to(target.device)
    tangents = tangents_of(problem)
    inputs, options = problem.records()
    passes = select_backend(target.backend, target.device)
    before = [t.clone() for t in problem.tensors()]
    _, sums = passes.hypergradient(inputs, options, tangents, True)
    for old, new in zip(before, problem.tensors(), strict=True):
        assert torch.equal(old, new)
    stepped = inputs.covariance.clone()
    passes.covariance_step(stepped, inputs.weight, tangents.weight, sums, -0.25)
    gradient = by_backend(problem, tangents, target.backend)["covariance"]
    torch.testing.assert_close(stepped, inputs.covariance - 0.25 * gradient)
    assert torch.equal(stepped[6:], inputs.covariance[6:])
    if structure == "full":
        assert torch.equal(gradient, gradient.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES[:-2] + [(40, 3, 33), (9, 30, 4), (11, 12, 4)])
@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_the_bound_is_no_less_than_the_norm_and_not_far_from_it(target, size, dtype, alpha):
    problem = random_problem(*size, dtype=dtype, alpha=alpha).to(target.device)
    tangents = tangents_of(problem)
    inputs, options = problem.records()
    passes = select_backend(target.backend, target.device)
    _, sums = passes.hypergradient(inputs, options, tangents, True)
    bound = passes.covariance_step_bound(inputs.weight, tangents.weight, sums)
    if target.backend == "triton" or torch.device(target.device).type != "cpu":
        assert bound is None
        return
    gradient = by_backend(problem, tangents, target.backend)["covariance"].double()
    norm = torch.linalg.matrix_norm(gradient)
    assert bound.shape == (size[1],)
    assert (bound >= norm).all()
    assert (bound[norm == 0] == 0).all()
    assert bound.sum() <= 12 * norm.sum()
