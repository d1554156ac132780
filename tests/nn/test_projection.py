"""Steps of Σ in place that stay in the cone: checked rarely, and when they must be."""

import pytest
import torch

from iada.nn.projection import (
    SemidefiniteSteps,
    nearest_positive_semidefinite,
    semidefinite_or_former,
)

CLASSES, WIDTH = 4, 24


def covariances(rank):
    generator = torch.Generator().manual_seed(rank)
    factor = torch.randn(CLASSES, WIDTH, rank, generator=generator)
    return factor @ factor.mT


def symmetric_steps(size, count):
    """`count` times one step of Frobenius norm `size`, each class its own."""
    step = torch.randn(CLASSES, WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    step = step + step.mT
    return [step * (size / torch.linalg.matrix_norm(step))[:, None, None]] * count


def guard():
    return SemidefiniteSteps(torch.zeros(CLASSES), torch.zeros((), dtype=torch.int64))


def walk(steps, covariance, guarded):
    checks = []
    for step in steps:
        bound = torch.linalg.matrix_norm(step) * (1 + 1e-6)

        def move(sigma, step=step):
            sigma += step

        if guarded is None:
            move(covariance)
            continue
        guarded.step(covariance, bound, move)
        checks.append(int((guarded.unchecked == 0).sum()))
    return checks


def test_small_steps_are_taken_unchecked(monkeypatch):
    """As those of the published step sizes are: less than the rounding of Σ in a whole run."""
    monkeypatch.setattr("iada.nn.projection._semidefinite_or_former", None)  # not called
    covariance = covariances(rank=3)
    literal, guarded = covariance.clone(), guard()
    walk(symmetric_steps(1e-7, 10), literal, None)
    walk(symmetric_steps(1e-7, 10), covariance, guarded)
    assert torch.equal(covariance, literal)
    assert guarded.held == 0
    assert (guarded.unchecked > 0).all()


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("rank", [1, 5, WIDTH])
def test_many_steps_stay_within_twice_what_a_factorization_allows(rank, size):
    """Small ones add up: without the account of them the sum would leave the cone unseen."""
    covariance = covariances(rank)
    allowed = 2 * WIDTH * torch.finfo(torch.float32).eps * covariance.diagonal(dim1=1, dim2=2)
    literal, guarded = covariance.clone(), guard()
    checks = walk(symmetric_steps(size, 1200), covariance, guarded)
    walk(symmetric_steps(size, 1200), literal, None)
    smallest = torch.linalg.eigvalsh(covariance.double())[:, 0]
    assert (smallest >= -1.5 * allowed.sum(dim=1)).all()  # Σ and so its trace have moved
    assert sum(checks) > 0
    if rank < WIDTH:
        assert guarded.held > 0
        assert (torch.linalg.eigvalsh(literal.double())[:, 0] < -4 * allowed.sum(dim=1)).any()


def test_a_step_that_leaves_the_cone_goes_back_class_by_class():
    covariance, guarded = covariances(rank=WIDTH), guard()
    former = covariance.clone()
    step = torch.zeros_like(covariance)
    step[1] = -2 * former[1]
    step[2, 0, 0] = torch.nan
    step[3] = 0.5 * former[3]
    bound = torch.linalg.matrix_norm(step)
    guarded.step(covariance, bound, lambda sigma: sigma.add_(step))
    assert guarded.held == 2
    assert torch.equal(covariance[:3], former[:3])
    assert torch.equal(covariance[3], 1.5 * former[3])
    expected, held = semidefinite_or_former(former + step, former)
    assert torch.equal(covariance, expected)
    assert held == 2


def test_classes_that_do_not_move_have_no_account():
    covariance, guarded = covariances(rank=2), guard()
    for step in symmetric_steps(1e-7, 3):
        step[0] = 0
        guarded.step(
            covariance, torch.linalg.matrix_norm(step), lambda sigma, s=step: sigma.add_(s)
        )
    assert guarded.unchecked[0] == 0
    assert (guarded.unchecked[1:] > 0).all()


def test_classes_are_counted_and_not_their_variances():
    former = torch.ones(4, 5)
    stepped = former.clone()
    stepped[1, :2] = -1.0
    stepped[3] = -2.0
    for found, count in (
        nearest_positive_semidefinite(stepped),
        semidefinite_or_former(stepped, former),
    ):
        assert count == 2
        assert (found >= 0).all()
