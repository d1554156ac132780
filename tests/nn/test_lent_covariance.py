"""Losses whose backward comes after Σ has streamed on."""

import copy
import io
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import iada
from iada.nn.lent_covariance import LentCovariance
from tests.helpers.problems import random_problem

pytestmark = pytest.mark.slow

CLASSES, WIDTH = 4, 5
STRUCTURES = ["full", "diag"]


def batches(count=3, device="cpu"):
    """(features, labels) of several batches, double; features ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(9, WIDTH, dtype=torch.float64, generator=generator)
            .to(device)
            .requires_grad_(),
            torch.randint(CLASSES, (9,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def make_head(device="cpu"):
    head = torch.nn.Linear(WIDTH, CLASSES).double().to(device)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, CLASSES * WIDTH).view(CLASSES, WIDTH))
        head.bias.copy_(torch.linspace(0, 1, CLASSES))
    return head


def module(structure="full", target=None, **options):
    backend = None if target is None else target.backend
    device = "cpu" if target is None else target.device
    loss = iada.IADALoss(CLASSES, WIDTH, structure=structure, backend=backend, **options)
    return loss.double().to(device)


@pytest.fixture
def copies(monkeypatch):
    """How many losses were given a copy of Σ."""
    given = []
    replace = LentCovariance.replace

    def counted(lent, covariance):
        given.append(weakref.ref(covariance))
        replace(lent, covariance)

    monkeypatch.setattr(LentCovariance, "replace", counted)
    return given


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_calls_before_one_backward(structure, reduction, target):
    def run(together):
        head, loss = make_head(target.device), module(structure, target, reduction=reduction)
        parts, data = [], batches(3, target.device)
        for features, labels in data:
            parts.append(loss(features, head.weight, head.bias, labels).sum())
            if not together:
                parts[-1].backward()
        if together:
            torch.stack(parts).sum().backward()
        return [head.weight.grad, head.bias.grad, *(features.grad for features, _ in data)]

    for have, want in zip(run(together=True), run(together=False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_update_between_a_loss_and_its_backward(structure, backend):
    (features, labels), (others, more), _ = batches()
    head, state = make_head(), iada.ClassCovariance(CLASSES, WIDTH, structure).double()
    state.update(features, labels)
    seen = state.covariance.clone()

    def gradient(covariance, change):
        weight, bias = head.weight, head.bias
        loss = iada.fused_loss(
            features, weight, bias, labels, covariance=covariance, backend=backend
        )
        change()
        return torch.autograd.grad(loss, [weight, features])

    want = gradient(seen, lambda: None)
    for change in (lambda: state.update(others, more), state.reset):
        before = state.covariance.clone()
        state.covariance.copy_(seen)
        for have, expected in zip(gradient(state, change), want, strict=True):
            torch.testing.assert_close(have, expected, rtol=1e-12, atol=1e-13)
        assert not torch.equal(state.covariance, seen)
        del before


def test_a_loop_copies_nothing(copies):
    head, loss = make_head(), module()
    for features, labels in batches():
        value = loss(features, head.weight, head.bias, labels)  # the last one is still alive
        value.backward()
    with torch.no_grad():
        values = [loss(features, head.weight, head.bias, labels) for features, labels in batches()]
    loss(*[features.detach(), head.weight.detach(), None, labels])
    loss(features, head.weight, head.bias, labels)  # nobody keeps it
    loss(features, head.weight, head.bias, labels).backward()
    assert len(values) == 3
    assert copies == []


def test_each_former_loss_has_the_copy_of_its_time(copies):
    head, loss = make_head(), module()
    values = [loss(features, head.weight, head.bias, labels) for features, labels in batches(4)]
    assert len({id(ref()) for ref in copies}) == 3
    loss.eval()
    (features, labels), *_ = batches(1)
    seen = [loss(features, head.weight, head.bias, labels) for _ in range(2)]
    loss.covariance.update(features, labels)
    assert len(copies) == 3 + 3  # the last of the four and both in evaluation mode …
    assert len({id(ref()) for ref in copies}) == 4  # … share one
    del values, seen
    assert all(ref() is None for ref in copies)


def test_a_gradient_penalty_over_two_calls():
    """Σ is lent to the graph of the gradient, too."""

    def penalty(between):
        (features, labels), (others, more), _ = batches()
        head, loss = make_head(), module(alpha=0.9)
        value = loss(features, head.weight, head.bias, labels)
        (slope,) = torch.autograd.grad(value, features, create_graph=True)
        whole = value + slope.square().sum()
        if between:
            loss(others, head.weight, head.bias, more)
        return torch.autograd.grad(whole, [head.weight, features])

    for have, want in zip(penalty(True), penalty(False), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "shrinkage", "sharded"])
def test_a_checkpointed_call_streams_its_batch_once(kind, reentrant):
    """Its backward calls it again, with the Σ that the first call left."""

    def run(repeats):
        (features, labels), (others, more), _ = batches()
        if kind == "sharded":
            loss = iada.ShardedIADALoss(CLASSES, WIDTH, None, structure="full").double()
        else:
            loss = module(shrinkage=3.0 if kind == "shrinkage" else 0.0)
        head = make_head()
        loss(others, head.weight, head.bias, more).backward()
        head.zero_grad()
        arguments = (features, head.weight, head.bias, labels)
        value = (
            checkpoint(loss, *arguments, use_reentrant=reentrant) if repeats else loss(*arguments)
        )
        value.backward()
        statistics = [loss.covariance.count, loss.covariance.mean, loss.covariance.covariance]
        return [value, features.grad, head.weight.grad, head.bias.grad, *statistics]

    for have, want in zip(run(repeats=True), run(repeats=False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-13)


def retained(loss, head, features, labels):
    value = loss(features, head.weight, head.bias, labels)
    value.backward(retain_graph=True)
    loss(features, head.weight, head.bias, labels)
    return value


def reloaded(loss, head, features, labels):
    value = loss(features, head.weight, head.bias, labels)
    loss.load_state_dict(module().state_dict())
    return value


@pytest.mark.parametrize("spoil", [retained, reloaded])
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_cannot_be_known_ahead_says_what_to_do(spoil, create_graph):
    (features, labels), *_ = batches(1)
    value = spoil(module(), make_head(), features, labels)
    with pytest.raises(RuntimeError, match="^covariance: expected Σ as .* got .*; call"):
        value.backward(create_graph=create_graph)


def test_copies_and_pickles_leave_the_graphs():
    (features, labels), *_ = batches(1)
    head, loss = make_head(), module()
    value = loss(features, head.weight, head.bias, labels)
    twin = copy.deepcopy(loss)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    for other in (twin, stored):
        assert torch.equal(other.covariance.covariance, loss.covariance.covariance)
        other(features, head.weight, head.bias, labels).backward()
    value.backward()


def test_a_covariance_that_asks_for_its_gradient_has_it():
    problem = random_problem(CLASSES * 3, CLASSES, WIDTH, structure="full")
    state = iada.ClassCovariance(CLASSES, WIDTH).double()
    state.covariance = problem.covariance.clone().requires_grad_()
    arguments = (problem.features, problem.weight, problem.bias, problem.labels)
    iada.fused_loss(*arguments, covariance=state).backward()
    assert state.covariance.grad.abs().max() > 0
