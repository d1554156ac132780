"""torch.compile takes the loss whole, and the native operators keep what they tell torch."""

import pytest
import torch

import iada
from iada_kernels import native
from iada_kernels.native.fakes import EPSILON, FEATURES, WEIGHT

pytestmark = pytest.mark.slow

LABELS = torch.tensor([0, 1, 2, 0, -100, 2, 0])


def make_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = {"features": (7, 5), "weight": (3, 5), "bias": (3,), "epsilon": (7,)}
    named = {
        name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()
    }
    factor = torch.randn(3, 5, 5, generator=generator, dtype=dtype)
    return {**named, "covariance": factor @ factor.mT}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(backend, device, reduction):
    given = [t.to(device).requires_grad_() for t in make_tensors().values()]
    labels = LABELS.to(device)

    def loss(features, weight, bias, epsilon, covariance):
        value = iada.fused_loss(
            features,
            weight,
            bias,
            labels,
            covariance=covariance,
            epsilon=epsilon,
            reduction=reduction,
            backend=backend,
        )
        return value.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*given), compiled(*given)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, given), torch.autograd.grad(expected, given), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_change_are_compiled_in_one_graph(backend, device, dynamic):
    """As an annealed α, which torch.compile takes for a symbol from its second value on.

    With dynamic=True all sizes and numbers are, from the first.
    """
    given = {name: t.to(device) for name, t in make_tensors().items()}
    features, weight = given["features"].requires_grad_(), given["weight"].requires_grad_()
    labels, sigma = LABELS.to(device), given["covariance"]

    def loss(features, weight, alpha, beta):
        numbers = {"alpha": alpha, "beta": beta, "log_prior": given["bias"]}
        return iada.fused_loss(
            features, weight, None, labels, covariance=sigma, backend=backend, **numbers
        )

    torch.compiler.reset()  # what other backends made of this function counts against its limit
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for numbers in ((0.1, 1.5), (0.2, 0.5), (0.4, 0.7)):
        expected, got = (f(features, weight, *numbers) for f in (loss, compiled))
        torch.testing.assert_close(got, expected)
        wanted, found = (torch.autograd.grad(v, (features, weight)) for v in (expected, got))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shrinkage", [0.0, 2.0])
def test_the_module_compiles_in_one_graph(shrinkage):
    """And streams each batch. Where torch's operators stand in, with breaks at the update of Σ."""
    given = make_tensors()
    features, weight = given["features"], given["weight"].requires_grad_()
    eager, module = (iada.IADALoss(3, 5, shrinkage=shrinkage) for _ in range(2))
    whole = native.is_available()
    compiled = torch.compile(module, fullgraph=whole, backend="aot_eager")
    for _ in range(2):
        expected, got = (f(features, weight, None, LABELS) for f in (eager, compiled))
        torch.testing.assert_close(got, expected)
        (a,), (b,) = (torch.autograd.grad(loss, weight) for loss in (got, expected))
        torch.testing.assert_close(a, b)
    assert torch.equal(module.covariance.count, eager.covariance.count)
    torch.testing.assert_close(module.covariance.covariance, eager.covariance.covariance)


@pytest.mark.parametrize("shrinkage", [0.0, 2.0])
def test_a_compiled_module_leaves_rows_of_float16_that_overflow_out_of_the_covariance(shrinkage):
    """What a GradScaler skips: Σ would not be finite for good."""
    given = make_tensors()
    features, weight = given["features"].half(), given["weight"]
    expected, module = (iada.IADALoss(3, 5, shrinkage=shrinkage) for _ in range(2))
    whole = native.is_available()
    compiled = torch.compile(module, fullgraph=whole, backend="aot_eager")
    compiled(features, weight, None, LABELS)
    expected(features, weight, None, LABELS)
    expected(features, weight, None, LABELS.where(torch.arange(7) != 2, -100))
    features[2, 3] = torch.inf
    compiled(features, weight, None, LABELS)
    assert torch.equal(module.covariance.count, expected.covariance.count)
    torch.testing.assert_close(module.covariance.covariance, expected.covariance.covariance)


@pytest.mark.skipif(not native.is_available(), reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needs", [0, FEATURES, WEIGHT | EPSILON, 63])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("rounded", [False, True])
def test_opcheck_of_the_native_operators(dtype, needs, reduction, rounded):
    tensors = make_tensors(dtype)
    features, weight, bias, epsilon, covariance = tensors.values()
    forward = (
        features,
        weight,
        bias,
        LABELS,
        covariance,
        epsilon,
        torch.zeros(3, dtype=dtype),
        None,
        0.5,
        1.0,
        -100,
        reduction,
        needs,
        rounded,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.iada_native.loss_forward, forward, test_utils=tests)
    if reduction and needs:
        _, residual, partial = torch.ops.iada_native.loss_forward(*forward)
        one = torch.ones((), dtype=dtype)
        backward = (one, features, weight, LABELS, residual, partial, 3, 0.5, 1.0, -100, needs)
        torch.library.opcheck(torch.ops.iada_native.loss_backward, backward, test_utils=tests)


@pytest.mark.skipif(not native.is_available(), reason="needs the native library")
def test_opcheck_of_the_native_update():
    state = (torch.zeros(3, 5, 5), torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
    arguments = (*state, make_tensors()["features"], LABELS)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.iada_native.covariance_update, arguments, test_utils=tests)


def test_an_update_before_backward_is_an_error(backend, device):
    features = make_tensors()["features"].to(device)
    weight = torch.randn(3, 5, device=device, requires_grad=True)
    labels = LABELS.to(device)
    covariance = iada.ClassCovariance(3, 5).to(device)
    covariance.update(features, labels, backend=backend)
    features.requires_grad_()
    sigma = covariance.covariance  # the tensor itself: nobody knows that a loss awaits it
    loss = iada.fused_loss(features, weight, None, labels, covariance=sigma, backend=backend)
    covariance.update(features, labels, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
