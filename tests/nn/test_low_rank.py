"""Low-rank covariances in the loss: against the definition, eager, full Σ and torch's error."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import iada
from iada.meta.closed_form_step import relative_change
from iada.nn.projection import nearest_positive_semidefinite, semidefinite_or_former
from iada_kernels import dispatch, reference
from iada_kernels.low_rank import difference_norm, unpacked
from iada_kernels.torch_ops import class_blocks, low_rank
from tests.helpers.problems import (
    LAYOUTS,
    TENSORS,
    assert_same,
    eager,
    fused,
    max_norm,
    random_problem,
    reference_loss,
    value_and_gradients,
)
from tests.nn.test_loss import assert_error_within_ratio, terms
from tests.nn.test_loss_gradients import NoHostReads, as_function, run_torch_ops
from tests.nn.test_memory import largest_output

pytestmark = pytest.mark.usefixtures("one_thread")

# As (N, C, A, r): odd, more and fewer rows than classes, rank 0, the width, and above it.
SHAPES = [(7, 4, 5, 2), (5, 9, 6, 1), (33, 6, 17, 4), (1, 3, 2, 0), (9, 3, 4, 4), (6, 2, 3, 5)]


@pytest.fixture
def accelerator_path(monkeypatch):
    """The CPU takes the path of accelerators, on which nothing is counted."""
    monkeypatch.setattr(low_rank, "counts_classes", lambda labels: False)


def problem_of(shape, **terms):
    *sizes, rank = shape
    return random_problem(*sizes, structure="low-rank", rank=rank, **terms)


# The loss -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9), st.integers(0, 11)),
    terms=terms.map(lambda drawn: {k: v for k, v in drawn.items() if k != "structure"}),
    smoothing=st.sampled_from([0.0, 0.1]),
    layout=st.sampled_from(LAYOUTS),
)
def test_fused_equals_the_definition_and_eager(shape, terms, smoothing, layout):
    layouts = {name: layout for name in TENSORS if (name, layout) != ("weight", "expanded")}
    problem = problem_of(shape, **terms, layouts=layouts, label_smoothing=smoothing)
    before = [tensor.clone() for tensor in problem.tensors()]
    expected = value_and_gradients(reference_loss, problem)
    for way in (fused(None), fused("torch"), eager):
        assert_same(value_and_gradients(way, problem), expected)
    assert_same(value_and_gradients(fused(None), problem, create_graph=True), expected)
    assert all(map(torch.equal, before, problem.tensors()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_path_of_accelerators_gives_the_same(shape, accelerator_path, block_elements):
    problem = problem_of(shape)
    expected = value_and_gradients(reference_loss, problem)
    for elements in (16, 2**20):
        block_elements(elements)
        assert_same(value_and_gradients(fused("torch"), problem), expected)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_projections_too_large_to_keep_are_made_again(shape, monkeypatch):
    monkeypatch.setattr(low_rank, "MOST_PROJECTIONS", 0)
    problem = problem_of(shape)
    expected = value_and_gradients(reference_loss, problem)
    assert_same(value_and_gradients(fused("torch"), problem), expected)


@pytest.mark.parametrize("shape", [(3, 2, 2, 1), (1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_finite_differences_of_both_orders(shape, reduction):
    problem = problem_of(shape, ignored=0.0, margin=1e-2, reduction=reduction)
    loss, leaves = as_function(problem, None, TENSORS)
    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("shape", [(64, 10, 32, 8), (6, 20, 16, 5)], ids=["N>=C", "N<C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_errs_no_more_than_eager(shape, dtype):
    assert_error_within_ratio(problem_of(shape, dtype=dtype), None, torch.device("cpu"))


def test_an_offset_common_to_all_rows_of_the_head_does_not_cancel():
    """The projections of W are taken apart by class, which is W's differences but for rounding."""
    problem = problem_of((1, 6, 16, 4), dtype=torch.float32)
    weight, sigma, classes = problem.weight + 300.0, problem.covariance, torch.arange(6)
    exact = reference.quadratic_forms(weight.double(), sigma.double(), classes)
    by_torch = max_norm(reference.quadratic_forms(weight, sigma, classes).double() - exact)
    error = max_norm(low_rank.class_table(weight, sigma, classes).double() - exact)
    assert error <= max(4 * by_torch, 2**-20 * max_norm(exact))


def test_many_classes_are_no_matter_for_tiles(monkeypatch):
    monkeypatch.setattr(class_blocks, "MOST_LOGITS", 1)
    problem = problem_of((5, 9, 6, 2))
    expected = value_and_gradients(reference_loss, problem)
    assert_same(value_and_gradients(fused(None), problem), expected)


@pytest.mark.parametrize("shape", [(7, 4, 5, 5), (3, 6, 4, 4), (9, 3, 4, 6)], ids=str)
def test_a_whole_rank_is_a_full_covariance(shape):
    problem = problem_of(shape)
    parts = unpacked(problem.covariance, shape[2])
    expected = value_and_gradients(fused(None), replace(problem, covariance=parts.dense()))
    found = value_and_gradients(fused(None), problem)
    by_sigma, own = expected.pop("covariance"), unpacked(found.pop("covariance"), shape[2])
    assert_same(found, expected)
    by_sigma = (by_sigma + by_sigma.mT) / 2
    torch.testing.assert_close(own.diagonal, by_sigma.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(own.factors, 2 * by_sigma @ parts.factors)


def test_a_record_gets_the_gradients_of_its_parts():
    problem = problem_of((7, 4, 5, 2))
    parts = unpacked(problem.covariance, 5)
    leaves = iada.LowRankCovariance(*(part.clone().requires_grad_() for part in parts))
    expected = unpacked(value_and_gradients(fused(None), problem)["covariance"], 5)
    for way in (fused(None), eager):
        loss = way(replace(problem, covariance=leaves))
        got = torch.autograd.grad(loss * (1.3 + 1.0), leaves)
        for have, want in zip(got, expected, strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("elements", [16, 2**20])
def test_nothing_is_read_on_the_host(rows, elements, accelerator_path, block_elements):
    block_elements(elements)
    problem = problem_of((rows, 6, 5, 2))
    with NoHostReads():
        run_torch_ops(problem)


def test_it_runs_without_data():
    problem = problem_of((3, 6, 5, 2)).to("meta")
    found = value_and_gradients(fused(None), problem)
    assert {name: t.shape for name, t in found.items() if name != "loss"} == {
        name: t.shape for name, t in problem.floating().items()
    }


def test_nothing_of_rows_by_classes_by_features():
    rows, classes, width, rank = 256, 24, 96, 6
    terms = {"dtype": torch.float32, "margin": 0.0}
    problem = problem_of((rows, classes, width, rank), **terms)
    ours = largest_output(fused(None), problem)
    # Of U·C·A, or even of half a full Σ, nothing; the packed Σ's own gradient is the largest.
    assert ours.numel <= max(rows * width, classes * width * (1 + rank)), ours.maker


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    problem = problem_of((7, 3, 5, 2), dtype=torch.float32)
    given = [t.requires_grad_() for t in problem.floating().values()]

    def loss(*tensors):
        named = dict(zip(problem.floating(), tensors, strict=True))
        return fused(None)(replace(problem, **named))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*given), compiled(*given)
    torch.testing.assert_close(got, expected)
    for have, want in zip(
        torch.autograd.grad(got, given), torch.autograd.grad(expected, given), strict=True
    ):
        torch.testing.assert_close(have, want)


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "triton"])
def test_other_backends_take_torchs_products(name):
    problem, state = problem_of((7, 4, 5, 2)), iada.ClassCovariance(4, 5, "low-rank", 2).double()
    rows = problem.features, problem.labels.clamp(min=0)
    if dispatch.why_not(name, torch.device("cpu"), torch.float64):
        with pytest.raises(RuntimeError, match=f"^backend: '{name}' cannot serve"):
            fused(name)(problem)
        with pytest.raises(RuntimeError, match=f"^backend: '{name}' cannot serve"):
            state.update(*rows, backend=name)
        assert not state.count.any()
        return
    torch.testing.assert_close(fused(name)(problem), fused("torch")(problem), rtol=0, atol=0)
    other = iada.ClassCovariance(4, 5, "low-rank", 2).double()
    state.update(*rows, backend=name)
    other.update(*rows, backend="torch")
    for buffer, same in zip(state.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, same)
    fused(name)(problem_of((7, 4, 5, 0)))  # rank 0 is the diagonal structure


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:, :-1], r"^covariance: expected .* got shape \(4, 14\)"),
        (lambda c: c[:3], r"^covariance: expected .* got shape \(3, 15\)"),
        (lambda c: c.half(), r"^covariance: expected .* got dtype torch.float16"),
        (
            lambda c: iada.LowRankCovariance(c[:, :4], unpacked(c, 5).factors),
            r"^covariance.diagonal: expected a floating-point tensor \(C, A\)",
        ),
        (
            lambda c: iada.LowRankCovariance(c[:, :5], unpacked(c, 5).factors.mT),
            r"^covariance.factors: expected a floating-point tensor \(C, A, r\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    problem = problem_of((7, 4, 5, 2))
    for way in (fused(None), eager):
        with pytest.raises(ValueError, match=message):
            way(replace(problem, covariance=change(problem.covariance)))


@pytest.mark.parametrize("rank", [None, -1, 1.0, True])
def test_a_bad_rank_is_named(rank):
    with pytest.raises(ValueError, match=r"^rank: expected an int from 0"):
        iada.ClassCovariance(3, 4, "low-rank", rank)
    if rank is not None:
        with pytest.raises(ValueError, match=r"^rank: expected None with structure='full'"):
            iada.ClassCovariance(3, 4, rank=rank)


# The modules ----------------------------------------------------------------------------------


def test_iada_loss_streams_and_a_later_backward_sees_its_own_covariance():
    def run(together):
        torch.manual_seed(0)
        head = torch.nn.Linear(5, 3).double()
        loss = iada.IADALoss(3, 5, torch.tensor([9, 5, 2]), "low-rank", rank=2).double()
        losses = []
        for seed in range(3):
            problem = random_problem(8, 3, 5, ignored=0.0, seed=seed)
            losses.append(loss(problem.features, head.weight, head.bias, problem.labels))
            if not together:
                losses[-1].backward()
        if together:
            torch.stack(losses).sum().backward()
        return [*losses, head.weight.grad, head.bias.grad, loss.covariance.covariance]

    for have, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-13)


def test_state_dict_copies_and_dtypes():
    state = iada.ClassCovariance(3, 4, "low-rank", 2)
    problem = random_problem(20, 3, 4, ignored=0.0, dtype=torch.float32)
    state.update(problem.features, problem.labels)
    other = iada.ClassCovariance(3, 4, "low-rank", 2)
    other.load_state_dict(state.state_dict())
    for twin in (other, copy.deepcopy(state), copy.deepcopy(state).bfloat16()):
        for buffer, want in zip(twin.buffers(), state.buffers(), strict=True):
            assert torch.equal(buffer, want)
            assert buffer.dtype == want.dtype
    assert state.double().covariance.dtype is torch.float64
    assert "structure='low-rank', rank=2" in repr(state)
    with pytest.raises(RuntimeError, match="size mismatch for covariance"):
        iada.ClassCovariance(3, 4, "low-rank", 3).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="^structure: expected 'low-rank'"):
        _ = iada.ClassCovariance(3, 4).low_rank


def test_a_divergence_is_seen():
    state, head = iada.ClassCovariance(3, 4, "low-rank", 2), torch.nn.Linear(4, 3)
    iada.check_divergence(head, state, 0.5)
    state.low_rank.factors.fill_(100.0)
    with pytest.raises(FloatingPointError, match="quadratic term"):
        iada.check_divergence(head, state, 0.5)


# Eq. 9 stays among covariances ----------------------------------------------------------------


def test_negative_variances_of_the_diagonal_go_back_and_factors_stay():
    former = iada.LowRankCovariance(torch.ones(3, 4), torch.randn(3, 4, 2)).packed()
    moved = former - 0.5
    moved[1, 2] = -0.1
    found, held = semidefinite_or_former(moved, former, 4)
    assert int(held) == 1
    assert found[1, 2] == former[1, 2]
    moved[1, 2] = found[1, 2]
    assert torch.equal(found, moved)
    moved[2, 7] = torch.nan  # of a factor
    assert semidefinite_or_former(moved, former, 4)[0].isfinite().all()
    moved[1, 2], moved[2, 7] = -0.1, -7.0
    projected, changed = nearest_positive_semidefinite(moved, 4)
    assert int(changed) == 1
    assert projected[1, 2] == 0
    assert projected[2, 7] == -7.0


def test_the_change_of_a_covariance_is_measured_as_of_the_full_one():
    parts = [
        iada.LowRankCovariance(torch.rand(3, 6).double(), torch.randn(3, 6, 2).double())
        for _ in range(2)
    ]
    parts[1] = iada.LowRankCovariance(*(a + 1e-7 * b for a, b in zip(*parts, strict=True)))
    dense = [part.dense() for part in parts]
    want = (dense[1] - dense[0]).norm(), dense[0].norm()
    found = difference_norm(parts[1], parts[0])
    torch.testing.assert_close(torch.stack(found), torch.stack(want), rtol=1e-6, atol=0.0)
    change = relative_change(parts[1].packed(), parts[0].packed(), 6)
    torch.testing.assert_close(change, want[0] / want[1], rtol=1e-6, atol=0.0)
