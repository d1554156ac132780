"""The loss in tiles of rows × classes: the definition's value and gradients, and no N×C."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iada
from iada_kernels.contract import LossInputs, LossNeeds, LossOptions
from iada_kernels.torch_ops import class_blocks
from tests.conftest import _targets
from tests.helpers.problems import (
    REDUCTIONS,
    TENSORS,
    assert_same,
    cotangent,
    fused,
    max_norm,
    random_problem,
    reference_loss,
    value_and_gradients,
)
from tests.nn.test_loss import assert_error_within_ratio, dtypes
from tests.nn.test_loss import terms as any_terms
from tests.nn.test_loss_gradients import assert_derivatives, small_problem
from tests.nn.test_memory import largest_output

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    not any(target.backend == "triton" for target in _targets()), reason="no Triton here"
)
STRUCTURES = (None, "diag")

shapes = st.fixed_dictionaries(
    {"rows": st.integers(0, 40), "width": st.integers(1, 6), "classes": st.integers(7, 40)}
)
# The draws of test_loss.py, without a full Σ.
terms = any_terms.filter(lambda drawn: drawn["structure"] != "full")


@pytest.fixture(scope="module")
def tiles():
    """Every N×C counts as large, and a tile has 11 rows and 11 classes; calls are counted."""
    calls = []
    forward = class_blocks.loss_forward

    def counted(*arguments):
        calls.append(arguments)
        return forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_blocks, "MOST_LOGITS", -1)
        patch.setattr(class_blocks, "NARROW", 8)
        patch.setattr("iada_kernels.torch_ops.blocking.BLOCK_ELEMENTS", 8 * 11)
        patch.setattr(class_blocks, "loss_forward", counted)
        yield calls


@given(shape=shapes, terms=terms)
def test_the_definition(shape, terms, tiles):
    problem, before = random_problem(**shape, **terms), len(tiles)
    kept = [tensor.clone() for tensor in problem.tensors()]
    found = value_and_gradients(fused("torch"), problem)
    assert_same(found, value_and_gradients(reference_loss, problem))
    assert len(tiles) == before + 1
    assert all(map(torch.equal, problem.tensors(), kept))


@given(shape=shapes, terms=terms, dtypes=dtypes)
def test_mixed_dtypes_err_no_more_than_eager(shape, terms, dtypes, tiles):
    assert_error_within_ratio(random_problem(**shape, **terms, dtypes=dtypes), "torch", CPU)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_eager(structure, dtype, tiles):
    problem = random_problem(40, 90, 30, structure=structure, dtype=dtype)
    assert_error_within_ratio(problem, "torch", CPU)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_finite_differences(structure, reduction, tiles):
    problem = small_problem(4, 13, 3, structure=structure, reduction=reduction)
    assert_derivatives(problem, "torch")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("absent", ["bias", "epsilon", "log_prior"])
def test_finite_differences_without_a_term(structure, absent, tiles):
    problem = small_problem(4, 13, 3, structure=structure, **{absent: False})
    assert_derivatives(problem, "torch")


@pytest.mark.parametrize("wanted", TENSORS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_gradient_by_itself(structure, wanted, tiles):
    problem = random_problem(20, 30, 6, structure=structure)
    if wanted not in problem.floating():
        return

    def only(loss_of):
        leaves = problem.map(lambda t: t.detach().clone())
        leaf = getattr(leaves, wanted).requires_grad_()
        loss = loss_of(leaves)
        return {wanted: torch.autograd.grad(loss, leaf, cotangent(loss))[0]}

    assert_same(only(fused("torch")), only(reference_loss))


@pytest.mark.parametrize("scale", [75.0, 450.0])
def test_confident_samples_keep_their_digits(scale, tiles):
    """1 − p_y is e⁻¹⁰ or e⁻⁶⁰: relative to themselves, loss and gradients are those of float64."""
    labels, angle = torch.arange(12), torch.arange(12) * (torch.pi / 6)
    weight = torch.stack([angle.cos(), angle.sin()], dim=1)

    def results(dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (scale * weight, weight)]
        loss = iada.fused_loss(*leaves, None, labels, reduction="sum", backend="torch")
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for found, wanted in zip(results(torch.float32), results(torch.float64), strict=True):
        error = max_norm(found.double() - wanted) / max_norm(wanted)
        # Logits of this size are known to eps · scale, and so are exponents; h_y − the mean of its
        # neighbours in ∂ℓ/∂W is a seventh of h_y.
        assert error < 16 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("kept", [17, 1])
def test_classes_without_prior(kept, tiles):
    """log π = −∞: a class takes no part, and costs its own rows an infinite loss."""
    problem = random_problem(30, 20, 5, structure="diag", ignored=0.0, reduction="none")
    problem.log_prior[kept:] = -torch.inf
    problem.labels[:] = torch.arange(30) % kept
    problem.labels[0] = 18
    found = value_and_gradients(fused("torch"), problem)
    wanted = value_and_gradients(reference_loss, problem)
    assert found["loss"][0] == wanted["loss"][0] == torch.inf
    for values in (found, wanted):
        values["loss"] = values["loss"][1:]
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same(found, wanted)


def test_a_second_backward_of_one_graph(tiles):
    problem = random_problem(20, 30, 6, structure="diag").map(lambda t: t.requires_grad_())
    loss, leaves = fused("torch")(problem), list(problem.floating().values())
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_label_that_is_no_class_makes_its_loss_nan(structure, tiles):
    """As in Triton's kernels: on a GPU nobody has looked at the labels."""
    problem = random_problem(20, 30, 6, structure=structure, reduction="none")
    inputs, options = problem.records()
    needs = LossNeeds(True, True, True, structure is not None, True, True)

    def computed(labels):
        given = inputs._replace(labels=labels)
        loss, saved = class_blocks.loss_forward(given, options, needs)
        return loss, class_blocks.loss_backward(given, options, saved, torch.ones(20), needs)

    wrong = torch.arange(20) % 5 == 2
    labels = torch.where(wrong, torch.tensor([-1, 30, -30, 2**40]).repeat(5), inputs.labels)
    loss, grads = computed(labels)
    assert torch.equal(loss.isnan(), wrong)
    expected, expected_grads = computed(labels.where(~wrong, options.ignore_index))
    assert torch.equal(loss[~wrong], expected[~wrong])
    for found, wanted in zip(grads.tensors(), expected_grads.tensors(), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)


# When, and what it holds -----------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_of_rows_by_classes(structure, monkeypatch, block_elements):
    shape, terms = (200, 300, 8), {"dtype": torch.float32, "margin": 0.0, "structure": structure}
    problem = random_problem(*shape, **terms)
    block_elements(8 * 40)
    monkeypatch.setattr(class_blocks, "MOST_LOGITS", 200 * 300)
    assert largest_output(fused("torch"), problem).numel >= 200 * 300
    monkeypatch.setattr(class_blocks, "MOST_LOGITS", 200 * 300 - 1)
    monkeypatch.setattr(class_blocks, "NARROW", 8)
    largest = largest_output(fused("torch"), problem)
    assert largest.numel <= 300 * 8, largest.maker


@pytest.mark.parametrize(
    ("shape", "more", "served"),
    [
        ((20, 30, 6), {}, True),
        ((19, 30, 6), {}, False),  # small enough for one N×C
        ((60, 10, 12), {}, False),  # no more than the features
        ((20, 30, 6), {"structure": "full"}, False),
        ((20, 30, 6), {"label_smoothing": 0.1}, False),
    ],
)
def test_when_it_serves(shape, more, served, tiles, monkeypatch):
    monkeypatch.setattr(class_blocks, "MOST_LOGITS", 599)
    problem, before = random_problem(*shape, **{"structure": "diag", **more}), len(tiles)
    value_and_gradients(fused("torch"), problem)
    assert len(tiles) - before == served


@needs_triton
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_triton_leaves_large_heads_to_these_passes(structure, streams, tiles):
    if streams and structure is None:
        pytest.skip("a stream has a Σ")
    problem, before = random_problem(20, 30, 6, structure=structure), len(tiles)

    def loss_of(p, backend):
        if not streams:
            return fused(backend)(p)
        module = iada.IADALoss(30, 6, structure="diag", backend=backend).double()
        module.log_prior = p.log_prior
        loss = module(p.features, p.weight, p.bias, p.labels, p.epsilon)
        state = module.covariance
        return loss + state.mean.sum() + state.covariance.sum() + 0 * p.covariance.sum()

    found, wanted = (
        value_and_gradients(lambda p, b=backend: loss_of(p, b), problem)
        for backend in ("triton", "torch")
    )
    assert_same(found, wanted)
    assert len(tiles) == before + 2


@needs_triton
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("classes", [2**20 - 1, 2**20, 5_000_000])
def test_few_rows_of_very_many_classes_fit_in_a_grid(structure, classes, monkeypatch):
    """Of which CUDA has 65,535 programs along all axes but the first."""
    from iada_kernels import triton
    from iada_kernels.triton.launch import recording

    def on_meta(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    sigma = None if structure is None else on_meta(classes, 4)
    labels = on_meta(3, dtype=torch.int64)
    inputs = LossInputs(on_meta(3, 4), on_meta(classes, 4), None, labels, sigma, on_meta(3), None)
    options, needs = LossOptions(), LossNeeds(True, True, False, structure is not None, True, False)
    monkeypatch.setattr(class_blocks, "MOST_LOGITS", 2**24)
    monkeypatch.setattr(class_blocks, "loss_forward", lambda *arguments: (on_meta(), None))
    with recording(execute=False, architecture="sm_90") as launches:
        triton.loss_forward(inputs, options, needs)
    assert bool(launches) == (classes < class_blocks.MOST_CLASSES)
    for launch in launches:
        assert max(launch.grid[1:], default=1) < 2**16, launch.kernel


def test_tiles_of_a_gpu_are_larger(monkeypatch, block_elements):
    block_elements(2**20)
    monkeypatch.setattr(class_blocks, "NARROW", 1024)
    on_cpu, on_gpu = (
        [rows.stop for rows in class_blocks._tiles(torch.empty(10_000, 512, device=kind))]
        for kind in ("cpu", "meta")
    )
    assert (on_cpu[0], on_gpu[0]) == (1024, 4096)
    assert on_cpu[-1] == on_gpu[-1] == 10_000


def test_a_large_head_on_a_cpu_is_served_by_itself(tiles):
    """Under backend=None too, native library or not."""
    weight = torch.randn(2**15, 10, requires_grad=True)
    before = len(tiles)
    with torch.no_grad():
        iada.fused_loss(torch.randn(2, 10), weight, None, torch.tensor([0, 7]))
    assert len(tiles) == before + 1
