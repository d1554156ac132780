"""Gradients of the loss: finite differences to second order, graphs, aliases, autocast, purity."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from iada_kernels.torch_ops import quadratic
from tests.helpers.problems import (
    REDUCTIONS,
    TENSORS,
    assert_same,
    confident_problem,
    cotangent,
    eager,
    fused,
    max_norm,
    random_problem,
    reference_loss,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STRUCTURES = (None, "full", "diag")
SHAPES = {"N>=C": (4, 3, 2), "N<C": (2, 3, 2)}
SUBSETS = [
    names for size in range(1, len(TENSORS) + 1) for names in itertools.combinations(TENSORS, size)
]


def small_problem(rows=4, classes=3, width=2, **terms):
    """The sign must not flip within the steps of finite differences."""
    return random_problem(rows, classes, width, margin=1e-2, **terms)


def as_function(problem, backend, names=None):
    """The loss as a function of the named tensors alone, and their leaves."""
    names = [name for name in names or TENSORS if name in problem.floating()]
    leaves = [getattr(problem, name).detach().requires_grad_() for name in names]

    def loss(*tensors):
        return fused(backend)(replace(problem, **dict(zip(names, tensors, strict=True))))

    return loss, leaves


def assert_derivatives(problem, backend, names=None):
    """First order entry by entry; second order along random directions, which costs less."""
    loss, leaves = as_function(problem, backend, names)
    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_finite_differences(structure, shape, reduction, compiled_target):
    backend, device = compiled_target
    problem = small_problem(*shape, structure=structure, reduction=reduction)
    assert_derivatives(problem.to(device), backend)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 2, 2)], ids=["N>=C", "N<C"])
def test_finite_differences_entry_by_entry(structure, shape, compiled_target):
    backend, device = compiled_target
    problem = small_problem(*shape, structure=structure, reduction="none", ignored=0.0)
    loss, leaves = as_function(problem.to(device), backend)
    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("absent", ["bias", "epsilon", "log_prior"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_finite_differences_without_a_term(structure, absent, ignored, compiled_target):
    backend, device = compiled_target
    problem = small_problem(structure=structure, ignored=ignored, **{absent: False})
    assert_derivatives(problem.to(device), backend)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_any_of_the_tensors_may_require_gradients(names, structure, compiled_target):
    """Each combination against finite differences, and against the gradients of all at once."""
    backend, device = compiled_target
    problem = small_problem(structure=structure).to(device)
    loss, leaves = as_function(problem, backend, names)
    assert gradcheck(loss, leaves, fast_mode=True, check_undefined_grad=False)
    first, second = two_orders(problem, backend, names, names)
    all_first, all_second = two_orders(problem, backend, TENSORS, names)
    assert_same(first, all_first, tolerance=1e-13)
    assert_same(second, all_second, tolerance=1e-13)


def two_orders(problem, backend, names, wanted):
    """Gradients of the loss, and of a function of these gradients, for the `wanted` tensors."""
    loss, leaves = as_function(problem, backend, names)
    chosen = [leaf for name, leaf in zip(names, leaves, strict=True) if name in wanted]
    first = torch.autograd.grad(loss(*leaves), chosen, create_graph=True)
    total = sum((grad * grad.detach().cos()).sum() for grad in first)
    if not total.requires_grad:  # the loss is linear in what was asked for
        second = [torch.zeros_like(leaf) for leaf in chosen]
    else:
        second = torch.autograd.grad(total, chosen, allow_unused=True, materialize_grads=True)
    first = [grad.detach() for grad in first]
    return dict(zip(wanted, first, strict=True)), dict(zip(wanted, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_finite_differences_of_an_asymmetric_covariance(shape, compiled_target):
    backend, device = compiled_target
    problem = small_problem(*shape, symmetric=False).to(device)
    assert_derivatives(problem, backend)


@pytest.mark.parametrize("scale", [75.0, 150.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_confident_samples_keep_their_digits(scale, structure, backend, device):
    """1 − p_y is e⁻¹⁰ or e⁻²⁰: relative to themselves, gradients are those of the definition."""
    exact = confident_problem(scale, structure)
    wanted = value_and_gradients(reference_loss, exact)
    found = value_and_gradients(fused(backend), exact.map(Tensor.float).to(device))
    for name in exact.floating():
        error = max_norm(found[name].cpu().double() - wanted[name]) / max_norm(wanted[name])
        assert error < 16 * torch.finfo(torch.float32).eps * scale, name


def test_no_gradients_no_graph(backend, device):
    problem = random_problem().to(device)
    assert not fused(backend)(problem).requires_grad
    leaves = problem.map(lambda t: t.detach().requires_grad_())
    with torch.no_grad():
        assert not fused(backend)(leaves).requires_grad


# Graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", [3, 20], ids=["N<C", "N>=C"])
def test_create_graph_gives_the_plain_gradients(structure, reduction, rows, backend, device):
    problem = random_problem(rows, 6, 5, structure=structure, reduction=reduction).to(device)
    plain = value_and_gradients(fused(backend), problem)
    assert_same(value_and_gradients(fused(backend), problem, create_graph=True), plain)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_second_gradients_equal_those_of_the_reference(structure, backend, device):
    problem = random_problem(20, 6, 5, structure=structure, reduction="none").to(device)

    def second(loss_of):
        leaves = problem.map(lambda t: t.detach().requires_grad_())
        tensors = list(leaves.floating().values())
        loss = loss_of(leaves)
        upstream = cotangent(loss).requires_grad_()
        first = torch.autograd.grad(loss, tensors, upstream, create_graph=True)
        total = sum((grad * grad.detach().cos()).sum() for grad in first)
        found = torch.autograd.grad(total, [*tensors, upstream])
        return dict(zip([*leaves.floating(), "upstream"], found, strict=True))

    assert_same(second(fused(backend)), second(reference_loss), tolerance=1e-11)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", [3, 20], ids=["N<C", "N>=C"])
def test_backward_twice_gives_the_same_bits(structure, rows, backend, device):
    problem = random_problem(rows, 6, 5, structure=structure, dtype=torch.float32).to(device)
    loss, leaves = as_function(problem, backend)
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()  # what backward returned belongs to the caller
    second = torch.autograd.grad(value, leaves)
    assert all(map(torch.equal, kept, second))


def test_backward_with_another_cotangent_on_a_retained_graph(backend, device):
    problem = random_problem(reduction="none").to(device)
    loss, leaves = as_function(problem, backend)
    value = loss(*leaves)
    ones = torch.ones_like(value)
    once = torch.autograd.grad(value, leaves, ones, retain_graph=True)
    thrice = torch.autograd.grad(value, leaves, 3 * ones)
    names = list(problem.floating())
    expected = dict(zip(names, (3 * grad for grad in once), strict=True))
    assert_same(dict(zip(names, thrice, strict=True)), expected, tolerance=1e-14)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_hooks_held_may_come_back_in_another_layout(structure, reduction, backend, device):
    """As of torch.autograd.graph.saved_tensors_hooks that compress, or keep elsewhere."""
    problem = random_problem(structure=structure, reduction=reduction).to(device)
    loss, leaves = as_function(problem, backend)
    value = loss(*leaves)
    expected = torch.autograd.grad(value, leaves, cotangent(value))
    hooks = torch.autograd.graph.saved_tensors_hooks

    def by_columns(tensor):
        return tensor.detach().movedim(0, -1).contiguous().movedim(-1, 0)

    with hooks(lambda tensor: by_columns(tensor) if tensor.dim() else tensor, lambda held: held):
        value = loss(*leaves)
    found = torch.autograd.grad(value, leaves, cotangent(value))
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want)


def test_changing_an_input_before_backward_is_an_error(backend, device):
    problem = random_problem().to(device)
    loss, leaves = as_function(problem, backend)
    value = loss(*leaves)
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_argument_is_changed(structure, create_graph, backend, device):
    problem = random_problem(structure=structure, reduction="none").to(device)
    copies = [tensor.clone() for tensor in problem.tensors()]
    versions = [tensor._version for tensor in problem.tensors()]
    loss, leaves = as_function(problem, backend)
    value = loss(*leaves)
    upstream = cotangent(value)
    kept = upstream.clone()
    torch.autograd.grad(value, leaves, upstream, create_graph=create_graph)
    assert torch.equal(upstream, kept)
    assert upstream._version == kept._version
    assert all(map(torch.equal, problem.tensors(), copies))
    assert [tensor._version for tensor in problem.tensors()] == versions


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "terms"),
    [
        ("bias", "log_prior", {}),
        ("bias", "epsilon", {"rows": 5, "classes": 5}),
        ("features", "weight", {"rows": 5, "classes": 5}),
        ("weight", "covariance", {"structure": "diag"}),
        ("features", "covariance", {"rows": 4, "classes": 4, "structure": "diag"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_tensor_as_two_arguments(one, other, terms, create_graph, backend, device):
    problem = random_problem(**terms).to(device)

    def gradients(loss_of):
        shared = getattr(problem, one).detach().requires_grad_()
        loss = loss_of(replace(problem, **{one: shared, other: shared}))
        (grad,) = torch.autograd.grad(loss, shared, create_graph=create_graph)
        return {"loss": loss.detach(), "shared": grad.detach()}

    assert_same(gradients(fused(backend)), gradients(reference_loss))


# Autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("rows", [3, 20], ids=["N<C", "N>=C"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_autocast_changes_nothing(structure, rows, backward_inside, create_graph, backend, device):
    problem = random_problem(rows, 6, 5, structure=structure, dtype=torch.float32).to(device)
    expected = value_and_gradients(fused(backend), problem, create_graph)
    loss, leaves = as_function(problem, backend)
    with torch.autocast(device.type, torch.bfloat16):
        value = loss(*leaves)
        if backward_inside:
            grads = torch.autograd.grad(value, leaves, cotangent(value), create_graph)
    if not backward_inside:
        grads = torch.autograd.grad(value, leaves, cotangent(value), create_graph)
    found = {"loss": value, **dict(zip(problem.floating(), grads, strict=True))}
    assert {name: t.dtype for name, t in found.items()} == {
        name: t.dtype for name, t in expected.items()
    }
    assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_autocast_does_not_change_eager(structure):
    problem = random_problem(structure=structure, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = eager(problem)
    assert torch.equal(value, eager(problem))


# The class table ------------------------------------------------------------------------------

TABLE_ROWS = pytest.mark.parametrize(
    "classes", [None, torch.tensor([3, 0, 3])], ids=["all classes", "some, repeated"]
)


@TABLE_ROWS
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_adjoint_of_the_class_table(structure, classes):
    """For any G; the loss alone would only try a G whose rows sum to 0."""
    problem = random_problem(classes=6, structure=structure)
    weight, sigma = problem.weight.requires_grad_(), problem.covariance.requires_grad_()
    table, product = quadratic.class_table_and_product(weight, sigma, classes)
    upstream = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.autograd.grad(
        quadratic.class_table(weight, sigma, classes), (weight, sigma), upstream
    )
    grad_weight = torch.zeros_like(weight)
    with torch.no_grad():
        grad_sigma = quadratic.class_table_backward(
            weight, sigma, classes, product, upstream, grad_weight, True
        )
    names = ("weight", "covariance")
    found = dict(zip(names, (grad_weight, grad_sigma), strict=True))
    assert_same(found, dict(zip(names, expected, strict=True)))


@TABLE_ROWS
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_common_offset_of_the_head_does_not_cancel_the_class_table(structure, classes):
    problem = random_problem(classes=6, structure=structure, dtype=torch.float32)
    weight = problem.weight + 300
    exact = quadratic.class_table(weight.double(), problem.covariance.double(), classes)
    found = quadratic.class_table(weight, problem.covariance, classes)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    own = torch.arange(6) if classes is None else classes
    assert not found.gather(1, own[:, None]).any()  # ρ_y is 0 without rounding


# No waiting for the device --------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Raises where an accelerator would have to be waited for.

    tolist() of a CPU tensor goes unseen; on meta tensors it fails.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        waits = ("_local_scalar_dense", "nonzero", "unique", "item", "masked_select", "equal")
        if name.startswith("aten::") and name[6:].removeprefix("_").startswith(
            tuple(wait.removeprefix("_") for wait in waits)
        ):
            raise AssertionError(f"{name} reads a tensor on the host")
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            index = [i for i in args[1] if i is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in index), "boolean index"
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_host_reads():
    tensor = torch.arange(3)
    reads = (
        lambda: tensor.sum().item(),
        lambda: tensor.nonzero(),
        lambda: tensor.unique(),
        lambda: tensor[tensor > 1],
    )
    for read in reads:
        with NoHostReads(), pytest.raises(AssertionError):
            read()


def run_torch_ops(problem):
    """Forward, backward and the differentiable form, below the checks of `fused_loss`."""
    from iada_kernels import torch_ops
    from iada_kernels.contract import LossInputs, LossNeeds, LossOptions

    p = problem
    inputs = LossInputs(
        p.features, p.weight, p.bias, p.labels, p.covariance, p.epsilon, p.log_prior
    )
    options = LossOptions(**p.options)
    needs = LossNeeds(**{name: name in p.floating() for name in TENSORS})
    loss, saved = torch_ops.loss_forward(inputs, options, needs)
    upstream = torch.ones_like(loss)
    torch_ops.loss_differentiable(inputs, options)
    return loss, torch_ops.loss_backward(inputs, options, saved, upstream, needs)


CLOSED_FORM_CASES = pytest.mark.parametrize(
    ("rows", "structure", "reduction", "elements"),
    [
        case
        for case in itertools.product((3, 20), STRUCTURES, REDUCTIONS, (16, 2**20))
        if case[2] == "mean" or case[3] == 2**20
    ],
)


@CLOSED_FORM_CASES
def test_closed_forms_read_nothing_on_the_host(
    rows, structure, reduction, elements, block_elements
):
    block_elements(elements)
    problem = random_problem(rows, 6, 5, structure=structure, reduction=reduction)
    with NoHostReads():
        run_torch_ops(problem)


@CLOSED_FORM_CASES
def test_closed_forms_run_without_data(rows, structure, reduction, elements, block_elements):
    """On meta tensors, where whatever depends on data fails."""
    block_elements(elements)
    problem = random_problem(rows, 6, 5, structure=structure, reduction=reduction)
    loss, grads = run_torch_ops(problem.to("meta"))
    assert loss.shape == ((rows,) if reduction == "none" else ())
    for name, tensor in problem.floating().items():
        assert getattr(grads, name).shape == tensor.shape


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fused_loss_runs_on_other_devices(structure):
    """A device that is neither CPU nor CUDA gets the torch closed forms."""
    problem = random_problem(structure=structure).to("meta")
    found = value_and_gradients(fused(None), problem)
    assert {name: t.shape for name, t in found.items() if name != "loss"} == {
        name: t.shape for name, t in problem.floating().items()
    }
