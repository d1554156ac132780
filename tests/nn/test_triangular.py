"""Full covariances held as triangles: the same loss, stream and Eq. 9, in half the memory."""

from dataclasses import replace

import pytest
import torch

import iada
from iada.meta.closed_form_step import relative_change
from iada.nn.projection import nearest_positive_semidefinite, semidefinite_or_former
from iada_kernels import reference, torch_ops
from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.low_rank import variances
from iada_kernels.triangular import (
    is_triangular,
    matrices,
    times_off_diagonal,
    triangles,
    triangular_shape,
)
from tests.helpers.problems import fused, random_problem, reference_loss

WIDTHS = [2, 3, 4, 5, 8, 33]


def sigma_of(count, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(count, width, 2 * width, dtype=dtype, generator=generator)
    return half @ half.mT / width


@pytest.mark.parametrize("width", [1, *WIDTHS])
def test_triangles_and_back(width):
    sigma = sigma_of(3, width)
    held = triangles(sigma)
    assert held.shape == (3, *triangular_shape(width))
    assert held.numel() == 3 * width * (width + 1) // 2
    assert is_triangular(held, width) == (width > 1)
    assert torch.equal(matrices(held, width), sigma.tril() + sigma.tril(-1).mT)
    assert torch.equal(triangles(matrices(held, width)), held)
    assert torch.equal(variances(held, width), sigma.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_change_is_measured_as_of_matrices(width):
    sigma = sigma_of(4, width)
    former, sigma = sigma[:2], sigma[2:]
    want = (sigma - former).norm() / former.norm()
    found = relative_change(triangles(sigma), triangles(former), width)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("shape", [(5, 5), triangular_shape(5), (5,), (15,)])
def test_zeros_that_stay_have_not_changed(shape):
    zeros = torch.zeros(2, *shape)
    assert relative_change(zeros, zeros, 5) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_derivatives_pass_through(width):
    held = triangles(sigma_of(2, width)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: matrices(t, width), held)
    assert torch.autograd.gradcheck(lambda t: triangles(matrices(t, width)), held)
    (found,) = torch.autograd.grad(matrices(held, width).sum(), held)
    ones = torch.ones_like(held)
    assert torch.equal(found, times_off_diagonal(ones, width, 2.0))


def both(**terms):
    """A problem with a full Σ, and the same with its triangles."""
    problem = random_problem(23, 7, 6, structure="full", **terms)
    return problem, replace(problem, covariance=triangles(problem.covariance.detach()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss_of", [fused("torch"), fused(None), reference_loss])
def test_loss_and_gradients_are_those_of_matrices(loss_of, reduction):
    results = []
    for problem in both(reduction=reduction):
        leaves = problem.map(lambda t: t.detach().clone().requires_grad_())
        loss = loss_of(leaves)
        names = list(leaves.floating())
        grads = torch.autograd.grad(loss.sum(), list(leaves.floating().values()))
        results.append({"loss": loss.detach(), **dict(zip(names, grads, strict=True))})
    full, packed = results
    symmetric = (full["covariance"] + full["covariance"].mT) / 2
    full["covariance"] = times_off_diagonal(triangles(symmetric), 6, 2.0)
    for name, wanted in full.items():
        torch.testing.assert_close(packed[name], wanted, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_of_any_order():
    _, problem = both(ignored=0.0)
    leaves = problem.map(lambda t: t.detach().clone().requires_grad_())

    def loss(covariance, weight):
        return iada.fused_loss(
            leaves.features.detach(), weight, None, leaves.labels, covariance=covariance, alpha=0.7
        )

    given = leaves.covariance, leaves.weight
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


@pytest.mark.parametrize("device", ["cpu", "masked"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_stream_is_that_of_matrices(width, device, monkeypatch):
    if device == "masked":  # what accelerators take
        module = torch_ops.covariance
        monkeypatch.setattr(
            module,
            "_update_full_grouped",
            lambda sigma, centred, labels, size, w, shift: module._update_full_masked(
                sigma, centred, labels, size[:-1].clamp(min=1)[:, None].to(w.dtype), w, shift
            ),
        )
    states = [
        iada.ClassCovariance(4, width, structure).double() for structure in ("full", "triangle")
    ]
    generator = torch.Generator().manual_seed(2)
    for count in (17, 1, 40):
        features = torch.randn(count, width, dtype=torch.float64, generator=generator) + 3
        labels = torch.randint(0, 3, (count,), generator=generator)
        for state in states:
            state.update(features, labels, backend="torch")
    full, packed = states
    torch.testing.assert_close(packed.dense(), full.covariance, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(packed.variances, full.variances, rtol=1e-12, atol=1e-13)
    given = packed.covariance.clone(), packed.mean.clone(), packed.count.clone()
    wanted, *_ = reference.covariance_update(*given, features, labels)
    packed.update(features, labels)
    torch.testing.assert_close(packed.covariance, wanted, rtol=1e-10, atol=1e-12)
    assert not packed.covariance[3].any()


def test_half_the_memory():
    full, packed = (iada.ClassCovariance(10, 512, s) for s in ("full", "triangle"))
    assert packed.covariance.nbytes * 2 == full.covariance.nbytes + 10 * 512 * 4


@pytest.mark.parametrize("shrinkage", [0.0, 5.0])
def test_a_module_trains_as_with_matrices(shrinkage):
    losses = {}
    for structure in ("full", "triangle"):
        torch.manual_seed(0)
        head = torch.nn.Linear(6, 4).double()
        criterion = iada.IADALoss(4, 6, structure=structure, shrinkage=shrinkage).double()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(5):
            features, labels = torch.randn(20, 6, dtype=torch.float64), torch.randint(4, (20,))
            loss = criterion(features, head.weight, head.bias, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        criterion.load_state_dict(criterion.state_dict())
        iada.check_divergence(head, criterion.covariance, 0.5)
        losses[structure] = loss.item()
    assert losses["triangle"] == pytest.approx(losses["full"], rel=1e-12)


@pytest.mark.parametrize("classes", [None, "few"])
def test_the_step_of_sigma_is_that_of_matrices(classes):
    problem, _ = both(ignored=0.0)
    if classes:
        problem.labels[:] = problem.labels % 2
    inputs = LossInputs(*(None if t is None else t.detach() for t in problem.records()[0]))
    held = inputs._replace(covariance=triangles(inputs.covariance))
    tangents = HeadTangents(
        torch.randn_like(inputs.features), torch.randn_like(inputs.weight), torch.randn(7).double()
    )
    options = LossOptions(0.5, 1.0, -100, "mean")
    moved = []
    for given in (inputs, held):
        grad_epsilon, sums = torch_ops.hypergradient(given, options, tangents, True)
        sigma = given.covariance.clone()
        torch_ops.covariance_step(sigma, given.weight, tangents.weight, sums, -0.3)
        moved.append((grad_epsilon, sigma))
    (epsilon, full), (packed_epsilon, packed) = moved
    torch.testing.assert_close(packed_epsilon, epsilon, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(matrices(packed, 6), full, rtol=1e-12, atol=1e-14)
    wanted = reference.hypergradient(held, options, tangents)[1]
    step = (packed - held.covariance) / -0.3
    torch.testing.assert_close(times_off_diagonal(step, 6, 2.0), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep", [nearest_positive_semidefinite, semidefinite_or_former])
def test_the_cone_is_kept_as_of_matrices(keep):
    former = sigma_of(5, 4)
    sigma = former - 0.6 * torch.eye(4, dtype=torch.float64)
    given = (sigma,) if keep is nearest_positive_semidefinite else (sigma, former)
    wanted, count = keep(*given)
    found, number = keep(*map(triangles, given), width=4)
    torch.testing.assert_close(matrices(found, 4), wanted, rtol=1e-12, atol=1e-13)
    assert 0 < number == count <= 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_semidefinite": False},
        {"project": True},
        {"hypergradient": "double-backward"},
        {"persistent": False, "covariance_lr": 1.0},
    ],
)
def test_meta_iada_is_that_of_matrices(options):
    states = {}
    for structure in ("full", "triangle"):
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh()).double()
        head = torch.nn.Linear(6, 3).double()
        optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.2)
        covariance = iada.ClassCovariance(3, 6, structure).double()
        counts = torch.tensor([20, 10, 5])
        settings = {"covariance_lr": 50.0, "clip_norm": 1.0, **options}
        meta = iada.MetaIADA(backbone, head, optimizer, counts, covariance=covariance, **settings)
        for _ in range(4):
            batch, meta_batch = (
                (torch.randn(n, 5, dtype=torch.float64), torch.arange(n) % 3) for n in (18, 6)
            )
            meta.step(batch, meta_batch)
        states[structure] = (
            head.weight.detach(),
            covariance.dense(),
            meta.covariance_change,
            meta.held,
        )
    for packed, full in zip(states["triangle"], states["full"], strict=True):
        torch.testing.assert_close(packed, full, rtol=1e-8, atol=1e-10)
    assert states["full"][1].abs().max() > 0


def test_what_is_refused():
    _, packed = both()
    packed = replace(packed, covariance=packed.covariance[:, :-1])
    with pytest.raises(ValueError, match=r"^covariance: expected .*, got shape \(7, 6, 3\)"):
        fused("torch")(packed)
    with pytest.raises(ValueError, match="structure='low-rank'"):
        _ = iada.ClassCovariance(2, 4, "triangle").low_rank
