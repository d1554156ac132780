"""The single-launch loss of small heads, on a GPU or in the Triton interpreter.

Memory that the launchers allocate starts as NaN in every test.
"""

from dataclasses import replace

import pytest
import torch

import iada
from iada_kernels import reference, torch_ops
from iada_kernels.contract import ClassStatistics, LossInputs, LossNeeds, LossOptions
from iada_kernels.dispatch import select_backend
from tests.helpers.problems import (
    assert_same,
    cotangent,
    fused,
    max_norm,
    random_problem,
    reference_loss,
    value_and_gradients,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
try:
    triton_backend = select_backend("triton", DEVICE)
except RuntimeError as reason:
    pytest.skip(str(reason), allow_module_level=True)

from iada_kernels.triton import launch, single_launch  # noqa: E402

pytestmark = pytest.mark.slow

# N, C, A: nothing, one of each, fewer rows than classes, sizes around blocks of 16 and 32.
SHAPES = [(0, 4, 3), (1, 1, 1), (5, 1, 9), (3, 9, 6), (35, 2, 17), (9, 33, 5), (40, 3, 16)]
EVERYTHING = LossNeeds(*[True] * 6)


def launched(run):
    """The names of the kernels that `run` starts, and what it returns."""
    with launch.recording() as launches:
        result = run()
    return [each.kernel.fn.__name__ for each in launches], result


def on_device(problem):
    return problem.to(DEVICE)


def inputs_of(problem):
    p = problem
    return LossInputs(p.features, p.weight, p.bias, p.labels, p.covariance, p.epsilon, p.log_prior)


def gradients(backend, inputs, options, needs=EVERYTHING, upstream=1.0, stream=None):
    loss, saved = backend.loss_forward(inputs, options, needs, stream)
    given = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    return {"loss": loss, **vars(backend.loss_backward(inputs, options, saved, given, needs))}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_in_double(shape, reduction):
    problem = on_device(random_problem(*shape, reduction=reduction, symmetric=False))
    names, found = launched(lambda: value_and_gradients(fused("triton"), problem))
    assert names == ["single_launch_kernel", "single_launch_backward_kernel"]
    assert_same(found, value_and_gradients(reference_loss, problem))


@pytest.mark.parametrize("left_out", ["bias", "epsilon", "log_prior", "structure"])
def test_absent_terms(left_out):
    absent = {left_out: None if left_out == "structure" else False}
    problem = on_device(random_problem(9, 4, 5, **absent))
    names, found = launched(lambda: value_and_gradients(fused("triton"), problem))
    assert names == ["single_launch_kernel", "single_launch_backward_kernel"]
    assert_same(found, value_and_gradients(reference_loss, problem))


@pytest.mark.parametrize("shape", [(35, 4, 17), (9, 33, 5), (3, 9, 6)], ids=str)
def test_single_precision_is_as_good_as_torch(shape):
    problem = on_device(random_problem(*shape, margin=1e-4, dtype=torch.float32))
    truth = value_and_gradients(reference_loss, problem.double())
    ours = value_and_gradients(fused("triton"), problem)
    torchs = value_and_gradients(fused("torch"), problem)
    for name, want in truth.items():
        assert ours[name].dtype == torch.float32
        error, other = (max_norm(f[name].double() - want) for f in (ours, torchs))
        # A few units in the last place of numbers of order 1, where torch happens to be exact.
        rounding = 16 * torch.finfo(torch.float32).eps * max(1.0, max_norm(want))
        assert error <= 4 * other + rounding, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_exactly(dtype):
    problem = on_device(random_problem(20, 4, 7, dtype=dtype))
    wide = problem.map(torch.Tensor.float)
    names, found = launched(lambda: value_and_gradients(fused("triton"), problem))
    assert names == ["single_launch_kernel", "single_launch_backward_kernel"]
    truth = value_and_gradients(fused("triton"), wide)
    for name, want in truth.items():
        if name != "features":
            assert torch.equal(found[name], want.to(found[name].dtype)), name
    assert found["features"].dtype == dtype
    # The interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found["features"].float(), truth["features"], rtol=eps, atol=eps * 2**-10
    )


@pytest.mark.parametrize("layout", ["transposed", "step", "offset"])
def test_strides(layout):
    names = ("features", "weight", "bias", "epsilon", "log_prior")
    plain = random_problem(20, 4, 7)
    laid_out = random_problem(20, 4, 7, layouts=dict.fromkeys(names, layout))
    labels = torch.stack([plain.labels, plain.labels], dim=1)[:, 0]
    found = value_and_gradients(fused("triton"), on_device(replace(laid_out, labels=labels)))
    assert_same(found, value_and_gradients(fused("triton"), on_device(plain)), 0.0)


@pytest.mark.parametrize("needed", [*LossNeeds.__annotations__, None])
def test_only_what_is_needed(needed):
    inputs = inputs_of(on_device(random_problem(20, 4, 7)))
    options = LossOptions(0.5, 1.0, -100, "mean")
    whole = gradients(triton_backend, inputs, options)
    needs = LossNeeds(*(name == needed for name in LossNeeds.__annotations__))
    names, part = launched(lambda: gradients(triton_backend, inputs, options, needs))
    assert len(names) == (1 if needed is None else 2)
    for name, found in part.items():
        if name in ("loss", needed):
            assert torch.equal(found, whole[name]), name
        else:
            assert found is None, name


def test_backward_again_with_another_gradient():
    problem = on_device(random_problem(20, 4, 7))
    inputs, options = inputs_of(problem), LossOptions(0.5, 1.0, -100, "mean")
    _, saved = triton_backend.loss_forward(inputs, options, EVERYTHING)
    found = [
        vars(
            triton_backend.loss_backward(
                inputs, options, saved, torch.tensor(g, device=DEVICE).double(), EVERYTHING
            )
        )
        for g in (1.0, -2.0, 1.0)
    ]
    for name, first in found[0].items():
        assert torch.equal(found[1][name], -2 * first), name
        assert torch.equal(found[2][name], first), name


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    problem = on_device(random_problem(20, 3, 4, ignored=0.1))
    options = LossOptions(0.5, 1.0, -100, "mean")
    problem.labels[7] = label
    found = gradients(triton_backend, inputs_of(problem), options)
    assert found["loss"].isnan()
    assert (found["features"][7] == 0).all()
    assert found["weight"].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_but_ignored_rows(reduction):
    problem = on_device(random_problem(6, 3, 4, reduction=reduction))
    problem = replace(problem, labels=torch.full_like(problem.labels, -100))
    for name, found in value_and_gradients(fused("triton"), problem).items():
        assert (found == 0).all(), name


def state_of(num_classes, width, dtype):
    return [
        torch.zeros(num_classes, width, width, dtype=dtype, device=DEVICE),
        torch.zeros(num_classes, width, dtype=dtype, device=DEVICE),
        torch.zeros(num_classes, dtype=torch.int64, device=DEVICE),
    ]


@pytest.mark.parametrize("shape", [(40, 3, 17), (6, 20, 5), (33, 1, 4), (0, 2, 3)], ids=str)
def test_streaming_update_comes_first(shape):
    held = state_of(*shape[1:], torch.float64)
    truth = [tensor.clone() for tensor in held]
    for seed in range(3):
        problem = on_device(random_problem(*shape, seed=seed))
        problem = replace(problem, covariance=held[0])
        before = held[0].clone()
        options = LossOptions(0.5, 1.0, -100, "mean")
        names, found = launched(
            lambda p=problem, o=options: gradients(
                triton_backend, inputs_of(p), o, upstream=1.5, stream=ClassStatistics(*held[1:])
            )
        )
        assert names == ["single_launch_kernel", "single_launch_backward_kernel"]
        kept = problem.labels != -100
        truth = list(
            reference.covariance_update(*truth, problem.features[kept], problem.labels[kept])
        )
        for ours, want in zip(held, truth, strict=True):
            assert max_norm(ours - want) <= 1e-12 * max(1.0, max_norm(want))
        assert torch.equal(held[0], held[0].mT)
        absent = torch.bincount(problem.labels[kept], minlength=shape[1]) == 0
        assert torch.equal(held[0][absent], before[absent])
        updated = inputs_of(replace(problem, covariance=truth[0]))
        assert_same(found, gradients(torch_ops, updated, options, upstream=1.5))


def test_single_precision_update_with_large_means():
    n, c, a = 60, 3, 17
    generator = torch.Generator().manual_seed(2)
    batches = [
        (
            (torch.randn(n, a, generator=generator) + 1e3).to(DEVICE),
            torch.randint(0, c, (n,), generator=generator).to(DEVICE),
        )
        for _ in range(3)
    ]
    ours, torchs = state_of(c, a, torch.float32), state_of(c, a, torch.float32)
    truth = state_of(c, a, torch.float64)
    options, weight = LossOptions(0.5, 1.0, -100, "mean"), torch.zeros(c, a, device=DEVICE)
    for features, labels in batches:
        inputs = LossInputs(features, weight, None, labels, ours[0], None, None)
        stream = ClassStatistics(*ours[1:])
        triton_backend.loss_forward(inputs, options, LossNeeds(*[False] * 6), stream)
        torch_ops.covariance_update(*torchs, features, labels)
        truth = list(reference.covariance_update(*truth, features.double(), labels))
    for found, other, want in list(zip(ours, torchs, truth, strict=True))[:2]:
        rounding = 4 * torch.finfo(torch.float32).eps * 1e3
        error = max_norm(found.double() - want)
        assert error <= 4 * max_norm(other.double() - want) + rounding


def test_module_in_training():
    """Loss, gradients and state of `IADALoss` equal those of the torch closed forms."""
    results = []
    for backend in ("triton", "torch"):
        module = iada.IADALoss(4, 6, torch.tensor([5, 3, 2, 1]), backend=backend).to(DEVICE)
        found = []
        for seed in range(2):
            problem = on_device(random_problem(12, 4, 6, seed=seed, dtype=torch.float32))
            leaves = problem.map(lambda t: t.detach().requires_grad_())
            loss = module(
                leaves.features, leaves.weight, leaves.bias, leaves.labels, leaves.epsilon
            )
            wanted = [leaves.features, leaves.weight, leaves.bias, leaves.epsilon]
            found += [loss.detach(), *torch.autograd.grad(loss, wanted, cotangent(loss))]
        results.append(found + list(module.buffers()))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 10, 64), (128, 100, 64)], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_training_step_is_two_launches_at_the_cifar_shapes(shape, architecture):
    n, c, a = shape

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    labels, count = empty(n, dtype=torch.int64), empty(c, dtype=torch.int64)
    inputs = LossInputs(empty(n, a), empty(c, a), empty(c), labels, empty(c, a, a), empty(n), None)
    options, needs = LossOptions(0.5, 1.0, -100, "mean"), LossNeeds(*[True] * 5, False)
    stream = ClassStatistics(empty(c, a), count)
    with launch.recording(execute=False, architecture=architecture) as forward:
        _, saved = triton_backend.loss_forward(inputs, options, needs, stream)
    with launch.recording(execute=False, architecture=architecture) as backward:
        triton_backend.loss_backward(inputs, options, saved, empty(), needs)
    assert [each.grid for each in forward] == [(c,)]
    assert len(backward) == 1


def test_what_does_not_fit_is_left_to_the_general_kernels():
    problem = random_problem(20, 4, 7)
    inputs, options = inputs_of(problem), LossOptions(0.5, 1.0, -100, "mean")
    assert single_launch.is_supported(inputs, options, None)
    assert not single_launch.is_supported(inputs, options._replace(reduction="none"), None)
    diagonal = inputs._replace(covariance=torch.ones(4, 7, dtype=torch.float64))
    assert not single_launch.is_supported(diagonal, options, None)
    strided = inputs._replace(covariance=problem.covariance[:, ::2])
    assert not single_launch.is_supported(strided, options, None)
    single = inputs._replace(covariance=problem.covariance.float())
    assert not single_launch.is_supported(single, options, None)
    wide = inputs._replace(features=torch.ones(20, 2000), weight=torch.ones(4, 2000))
    assert not single_launch.is_supported(wide, options, None)


def test_poison_is_seen():
    """Kernels that do not run leave NaN behind: the fixture works."""
    inputs = inputs_of(on_device(random_problem(5, 3, 4)))
    with launch.recording(execute=False):
        loss, saved = triton_backend.loss_forward(
            inputs, LossOptions(0.5, 1.0, -100, "mean"), EVERYTHING
        )
    assert loss.isnan()
    assert saved.weight.isnan().all()
    assert (saved.size < 0).all()
