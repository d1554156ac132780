"""The Triton kernels by their interpreter, or on a GPU: what other backends have no need of.

The suite's own tests run on this backend too; compilation is in test_triton_compile.py.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import iada
from iada_kernels import select_backend
from iada_kernels.contract import LossInputs, LossNeeds, LossOptions
from tests.conftest import _targets
from tests.helpers.problems import TENSORS, fused, random_problem, value_and_gradients
from tests.nn.test_covariance import (
    assert_population,
    assert_state,
    new_state,
    population,
    skewed_stream,
    splits,
)
from tests.nn.test_loss import (
    assert_agrees,
    assert_error_within_ratio,
    dtypes,
    layouts,
    shapes,
    terms,
)
from tests.nn.test_loss_gradients import as_function, small_problem
from tests.nn.test_memory import LargestOutput

if not any(target.backend == "triton" for target in _targets()):
    pytest.skip("triton serves no device here", allow_module_level=True)

from iada_kernels.triton import config
from iada_kernels.triton.config import Tile
from iada_kernels.triton.launch import recording
from tests.helpers.interpreter import GENERAL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


pytestmark = pytest.mark.slow
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def kernels(general):
    return config.use(GENERAL) if general else contextlib.nullcontext()


@few
@given(shape=shapes, terms=terms, layouts=layouts, general=st.booleans())
def test_drawn_problems(shape, terms, layouts, general):
    with kernels(general):
        assert_agrees(random_problem(**shape, **terms, layouts=layouts), "triton", DEVICE)


@few
@given(shape=shapes, terms=terms, dtypes=dtypes, general=st.booleans())
def test_drawn_dtypes(shape, terms, dtypes, general):
    problem = random_problem(**shape, **terms, dtypes=dtypes)
    with kernels(general):
        assert_error_within_ratio(problem, "triton", DEVICE)


@settings(max_examples=30)
@splits
def test_drawn_streams(stream, structure, cuts):
    assert_population(stream, structure, cuts, "triton", DEVICE)


@pytest.mark.parametrize("structure", ["full", "diag", None])
@pytest.mark.parametrize("size", [(7, 4, 5), (33, 6, 34), (3, 9, 6), (5, 1, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_general_kernels(structure, size, reduction):
    with config.use(GENERAL):
        problem = random_problem(*size, structure=structure, reduction=reduction)
        assert_agrees(problem, "triton", DEVICE)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_finite_differences_along_random_directions(structure, general, reduction):
    """First and second order."""
    problem = small_problem(structure=structure, reduction=reduction).to(DEVICE)
    loss, leaves = as_function(problem, "triton")
    with kernels(general):
        assert gradcheck(loss, leaves, fast_mode=True, check_undefined_grad=False)
        assert gradgradcheck(loss, leaves, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_each_tensor_alone_may_require_a_gradient(structure, general, name):
    problem = small_problem(structure=structure).to(DEVICE)
    with kernels(general):
        everything = value_and_gradients(fused("triton"), problem)
        loss, leaves = as_function(problem, "triton", [name])
        (found,) = torch.autograd.grad(1.3 * loss(*leaves) + loss(*leaves), leaves)
    torch.testing.assert_close(found, everything[name], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_general_kernels_take_a_stream_in(structure):
    """Update and loss in one call, against update and then loss by the definitions."""
    problem = random_problem(33, 5, 34, structure=None).to(DEVICE)
    one, two = (iada.IADALoss(5, 34, structure=structure).double().to(DEVICE) for _ in range(2))
    one.backend, two.backend = "triton", "torch"
    with config.use(GENERAL):
        for module in (one, two):
            for _ in range(2):
                loss = module(
                    problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon
                )
            module.last = loss
    torch.testing.assert_close(one.last, two.last, rtol=1e-12, atol=1e-12)
    for have, want in zip(one.buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diag", None])
def test_a_label_that_is_no_class_makes_its_loss_nan_and_reads_nothing(structure):
    problem = random_problem(9, structure=structure, ignored=0.0, reduction="none").to(DEVICE)
    problem.labels[2], problem.labels[5] = 10**6, -7
    options = problem.options

    p = problem
    inputs = LossInputs(
        p.features, p.weight, p.bias, p.labels, p.covariance, p.epsilon, p.log_prior
    )
    passes = select_backend("triton", DEVICE)
    needs = LossNeeds(True, True, True, False, True, False)
    loss, _ = passes.loss_forward(inputs, LossOptions(**options), needs)
    wrong = torch.zeros(9, dtype=torch.bool)
    wrong[2] = wrong[5] = True
    assert torch.equal(loss.isnan().cpu(), wrong)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="accesses are watched in the interpreter")
def test_characteristics_of_a_label_that_is_no_class_are_nan_and_nothing_else_is_read():
    from tests.helpers.sanitizer import watching

    problem = random_problem(9, ignored=0.0, dtype=torch.float32)
    features, labels, weight = problem.features, problem.labels, problem.weight
    logits = features @ weight.T
    passes = select_backend("triton", DEVICE)
    wrong = torch.arange(9) % 3 == 2
    given = labels.masked_scatter(wrong, torch.tensor([-100, 10**6, 2**32]))
    with watching():
        found = passes.characteristics(features, logits, given, weight, 2)
    assert found[wrong].isnan().all()
    right = passes.characteristics(features, logits, labels, weight, 2)
    assert torch.equal(found[~wrong, :7], right[~wrong, :7])
    assert found[~wrong].isfinite().all()


@pytest.mark.parametrize(
    ("structure", "width", "forward", "backward"),
    [("full", 20, 4, 2), ("full", 40, 4, 2), ("diag", 20, 3, 2)],
)
def test_launches_of_a_general_step(structure, width, forward, backward):
    """Forward with streaming update, and backward."""
    problem = random_problem(33, 5, width, structure=None, dtype=torch.float32).to(DEVICE)
    leaves = problem.map(lambda t: t.requires_grad_())
    module = iada.IADALoss(5, width, structure=structure, backend="triton").to(DEVICE)
    with config.use(GENERAL), torch.autograd.set_multithreading_enabled(False):
        with recording() as first:
            loss = module(
                leaves.features, leaves.weight, leaves.bias, problem.labels, leaves.epsilon
            )
        with recording() as second:
            loss.backward()
    assert (len(first), len(second)) == (forward, backward)


@pytest.mark.parametrize(
    ("structure", "epsilon", "softmax_classes", "launches"),
    [
        (None, True, 2048, ["rows_and_logits", "moments_and_sign", "logits", "head_backward"]),
        (None, False, 2048, ["logits", "head_backward"]),
        (None, False, 0, ["logits", "softmax", "head_backward"]),
        ("full", False, 2048, ["rows_and_logits", "class_pass", "logits"]),
    ],
)
def test_what_is_absent_has_no_launch(structure, epsilon, softmax_classes, launches):
    """Without a streaming update."""
    problem = random_problem(33, 5, 20, structure=structure, epsilon=epsilon).to(DEVICE)
    with (
        config.use(replace(GENERAL, softmax_classes=softmax_classes)),
        torch.autograd.set_multithreading_enabled(False),
        recording() as recorded,
    ):
        value_and_gradients(fused("triton"), problem)
    names = [launch.kernel.fn.__name__ for launch in recorded]
    assert names[: len(launches)] == [f"{name}_kernel" for name in launches]
    assert structure is not None or len(names) == len(launches)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softmax_classes", [0, 2048])
def test_rows_of_several_tiles_of_classes(reduction, softmax_classes):
    """The softmax by the last program to arrive, and as a launch of its own."""
    with config.use(replace(GENERAL, softmax_classes=softmax_classes)):
        problem = random_problem(35, 37, 6, structure=None, reduction=reduction)
        assert_agrees(problem, "triton", DEVICE)


def specialised(launch):
    """Constants, sizes and what is absent: part of what a kernel is compiled for."""
    leaves = launch.leaves().items()
    return {k: v for k, v in leaves if k.split(".")[-1].isupper() or v is None}


def test_annealing_does_not_compile_again():
    """What differs between two calls with other alpha and beta is no constant of any kernel."""
    constants = []
    for alpha in (0.1, 0.7):
        problem = random_problem(alpha=alpha, beta=2 * alpha, dtype=torch.float32).to(DEVICE)
        with recording() as launches, torch.autograd.set_multithreading_enabled(False):
            value_and_gradients(fused("triton"), problem)
        constants.append([specialised(launch) for launch in launches])
    assert constants[0] == constants[1]


def test_another_configuration_gives_the_same():
    problem = random_problem(40, 5, 40, structure="full").to(DEVICE)
    expected = value_and_gradients(fused("triton"), problem)
    with config.use(
        replace(config.NVIDIA, single_launch=replace(config.NVIDIA.single_launch, classes=0))
    ):
        found = value_and_gradients(fused("triton"), problem)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_large_results_by_large_tiles(structure):
    """Of which there are two here along rows and classes, the second for the most part empty."""
    problem = random_problem(65, 66, 16, structure=structure, dtype=torch.float32)
    large = config.LargeTiles(Tile(16, 64, 16), Tile(64, 32, 16), Tile(64, 16, 32))
    with config.use(replace(GENERAL, large=large)), recording() as launches:
        assert_error_within_ratio(problem, "triton", DEVICE)
    tiles = [launch.tile for launch in launches]
    assert (large.class_pass in tiles) == (structure == "full")
    assert (large.diagonal_logits in tiles) == (structure == "diag")
    assert (large.diagonal_weight in tiles) == (structure == "diag")


def test_one_step_is_deterministic():
    problem = random_problem(40, 6, 20, structure="full", dtype=torch.float32).to(DEVICE)
    first, second = (value_and_gradients(fused("triton"), problem) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_update_and_loss_see_the_batch_once():
    module = iada.IADALoss(4, 5, backend="triton").to(DEVICE)
    problem = random_problem(20, structure=None, dtype=torch.float32).to(DEVICE)
    module(problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon)
    counted = torch.bincount(problem.labels[problem.labels >= 0].cpu(), minlength=4)
    assert torch.equal(module.covariance.count.cpu(), counted)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_short_stream_in_float32(structure, offset):
    features, labels = skewed_stream(rows=1200, offset=offset)
    state = new_state(10, 16, structure, DEVICE)
    for h, y in zip(features.split(400), labels.split(400), strict=True):
        state.update(h.to(DEVICE), y.to(DEVICE), backend="triton")
    expected = population(features, labels, 10, structure)
    assert_state(state, expected, 2e-4 if offset else 2e-5, mean_tolerance=2e-6)
    if structure == "full":
        assert torch.equal(state.covariance, state.covariance.mT)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_no_temporary_of_the_eager_form(structure, architecture):
    """What the launchers allocate, without a launch: nothing of N×C×A, nothing of N×A×A."""
    rows, classes, width = 512, 24, 72
    problem = random_problem(
        rows, classes, width, structure=structure, dtype=torch.float32, margin=0.0
    ).to("meta")
    p = problem
    inputs = LossInputs(
        p.features, p.weight, p.bias, p.labels, p.covariance, p.epsilon, p.log_prior
    )
    options, needs = LossOptions(**p.options), LossNeeds(*[True] * 6)
    passes = select_backend("triton", DEVICE)
    with recording(execute=False, architecture=architecture) as launches, LargestOutput() as watch:
        loss, saved = passes.loss_forward(inputs, options, needs)
        passes.loss_backward(inputs, options, saved, torch.empty_like(loss), needs)
    assert launches
    assert watch.numel <= classes * width * max(classes, width), watch.maker
