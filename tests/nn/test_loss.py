"""The value and the first gradients of the loss: fused against the definition and against eager."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iada
from tests.helpers.problems import (
    LAYOUTS,
    REDUCTIONS,
    TENSORS,
    adjusted_logits,
    assert_same,
    cotangent,
    eager,
    fused,
    max_norm,
    random_problem,
    reference_loss,
    sign_argument,
    target_of,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Errors of fused and eager come from different orders of summation; a factor of 4 covers that.
ERROR_RATIO = 4

shapes = st.fixed_dictionaries(
    {"rows": st.integers(0, 40), "classes": st.integers(1, 12), "width": st.integers(1, 17)}
)
terms = st.fixed_dictionaries(
    {
        "structure": st.sampled_from([None, "full", "diag"]),
        "bias": st.booleans(),
        "epsilon": st.booleans(),
        "log_prior": st.booleans(),
        "ignored": st.sampled_from([0.0, 0.25, 1.0]),
        "reduction": st.sampled_from(REDUCTIONS),
        "alpha": st.floats(-1, 2),
        "beta": st.floats(-1, 2),
        "seed": st.integers(0, 10**6),
    }
)
# A head whose rows are all the same has g = 0, a sign made of rounding alone.
layouts = st.fixed_dictionaries(
    {name: st.sampled_from(LAYOUTS) for name in TENSORS if name != "weight"}
    | {"weight": st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"])}
)
dtypes = st.fixed_dictionaries(
    {
        name: st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
        for name in TENSORS
    }
)


def assert_agrees(problem, backend, device):
    expected = value_and_gradients(reference_loss, problem)
    # On a device as well: .to() keeps the strides of the CPU tensor where they are dense.
    actual = value_and_gradients(fused(backend), problem.to(device))
    assert_same({name: t.cpu() for name, t in actual.items()}, expected)


def assert_three_agree(problem, backend, device):
    assert_agrees(problem, backend, device)
    assert_same(value_and_gradients(eager, problem), value_and_gradients(reference_loss, problem))


@given(shape=shapes, terms=terms)
def test_fused_equals_reference_and_eager(shape, terms, compiled_target):
    assert_three_agree(random_problem(**shape, **terms), *compiled_target)


@given(shape=shapes, terms=terms, layouts=layouts)
def test_strides_do_not_matter(shape, terms, layouts, compiled_target):
    assert_agrees(random_problem(**shape, **terms, layouts=layouts), *compiled_target)


@given(shape=shapes, terms=terms, dtypes=dtypes)
def test_mixed_dtypes_err_no_more_than_eager(shape, terms, dtypes, compiled_target):
    problem = random_problem(**shape, **terms, dtypes=dtypes)
    assert_error_within_ratio(problem, *compiled_target)


@pytest.mark.parametrize("structure", [None, "full", "diag"])
@pytest.mark.parametrize("shape", [(64, 10, 32), (6, 20, 16)], ids=["N>=C", "N<C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_eager(structure, shape, dtype, backend, device):
    problem = random_problem(*shape, structure=structure, dtype=dtype)
    assert_error_within_ratio(problem, backend, device)


def assert_error_within_ratio(problem, backend, device):
    """Against float64 on the same inputs, fused errs at most ERROR_RATIO times what eager does.

    Eager may be exact by luck, so the unit is no less than what rounding explains: that of the
    result, and that of logits of size |z̃|, which moves every probability by a share eps·|z̃|.
    """
    exact = value_and_gradients(reference_loss, problem.double())
    torch_way = value_and_gradients(eager, problem)
    ours = value_and_gradients(fused(backend), problem.to(device))
    logits_eps = torch.finfo(torch_way["loss"].dtype).eps * max_norm(adjusted_logits(problem))
    for name, want in exact.items():
        have = ours[name].cpu()
        assert have.dtype == torch_way[name].dtype, name
        error, eager_error = (max_norm(t.double() - want) for t in (have, torch_way[name]))
        # The loss is a difference of logits of order 1, a gradient a sum of such terms.
        scale = max(max_norm(want), 1.0 if name == "loss" else 1e-3)
        if name in ("bias", "log_prior", "weight"):  # sums over rows of numbers that may cancel
            term = largest_residual(problem, exact["loss"])
            scale = max(scale, term * (max_norm(problem.features) if name == "weight" else 1.0))
        if name == "features":  # a sum over classes of numbers that may cancel
            term = largest_residual(problem, exact["loss"])
            scale = max(scale, term * max_norm(problem.weight))
        unit = max(eager_error, max(torch.finfo(have.dtype).eps, logits_eps) * scale)
        assert error <= ERROR_RATIO * unit, f"{name}: {error:.2e}, eager {eager_error:.2e}"


def largest_residual(problem, loss):
    """The largest |g_i D_ij|, of which the gradient of the bias is a sum."""
    if not problem.labels.numel():
        return 0.0
    rows = problem.with_options(reduction="none")
    counted = problem.labels != problem.options["ignore_index"]
    residual = (
        adjusted_logits(rows)
        .softmax(dim=1)
        .scatter_add(
            1, target_of(rows)[:, None], -torch.ones(len(problem.labels), 1, dtype=torch.float64)
        )
    )
    share = counted.sum().clamp(min=1) if problem.options["reduction"] == "mean" else 1
    return max_norm(residual * counted[:, None] / share) * max_norm(cotangent(loss))


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("rows", [3, 30], ids=["N<C", "N>=C"])
def test_asymmetric_covariance_means_the_same(structure, rows, backend, device):
    problem = random_problem(rows, 6, 5, structure=structure, symmetric=False)
    assert_three_agree(problem, backend, device)


@pytest.mark.parametrize("label_dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_signed_label_dtypes(label_dtype, ignore_index, backend, device):
    problem = random_problem(label_dtype=label_dtype, ignore_index=ignore_index)
    assert_three_agree(problem, backend, device)


@pytest.mark.parametrize("ignore_index", [255, 3])
def test_uint8_labels(ignore_index, backend, device):
    problem = random_problem(label_dtype=torch.uint8, ignore_index=ignore_index)
    assert_three_agree(problem, backend, device)


def test_uint8_labels_with_an_ignore_index_that_uint8_cannot_hold(backend, device):
    problem = random_problem(classes=200, label_dtype=torch.uint8, ignored=0.0)
    problem.labels[0] = 156  # −100 modulo 256: not ignored
    assert_three_agree(problem, backend, device)


@pytest.mark.parametrize("label_dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_wide_unsigned_labels(label_dtype, backend, device):
    problem = random_problem(label_dtype=label_dtype, ignored=0.0)
    assert_three_agree(problem, backend, device)


@pytest.mark.parametrize("structure", [None, "full", "diag"])
def test_a_log_prior_may_be_minus_infinity(structure, backend, device):
    """Of a class that no row is labelled with: its probability is 0."""
    problem = random_problem(rows=20, classes=4, structure=structure)
    labels = torch.where(problem.labels == 3, 1, problem.labels)
    problem.log_prior[3] = -torch.inf
    assert_three_agree(replace(problem, labels=labels), backend, device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", [None, "full", "diag"])
def test_labels_may_have_any_stride(structure, reduction, backend, device):
    """A column of a table, say: int64 already, so that nothing makes them contiguous."""
    problem = random_problem(structure=structure, reduction=reduction)
    column = torch.stack((problem.labels, torch.full_like(problem.labels, -7)), dim=1)[:, 0]
    assert not column.is_contiguous()
    assert_three_agree(replace(problem, labels=column), backend, device)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_class_covariance_stands_for_its_tensor(structure, backend, device):
    problem = random_problem(rows=20, structure=structure).to(device)
    state = iada.ClassCovariance(4, 5, structure).double().to(device)
    state.update(problem.features, problem.labels)
    options = {"epsilon": problem.epsilon, "log_prior": problem.log_prior}
    head = (problem.features, problem.weight, problem.bias, problem.labels)
    for loss in (iada.fused_loss, iada.eager_loss):
        more = {"backend": backend} if loss is iada.fused_loss else {}
        of_module = loss(*head, covariance=state, **options, **more)
        of_tensor = loss(*head, covariance=state.covariance, **options, **more)
        assert torch.equal(of_module, of_tensor)


# Dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [None, *TENSORS])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_float64_if_any_argument_is(double, low, backend, device):
    problem = random_problem(dtype=low, dtypes={double: torch.float64}).to(device)
    for loss_of in (fused(backend), eager):
        found = value_and_gradients(loss_of, problem)
        assert found.pop("loss").dtype == (torch.float64 if double else torch.float32)
        assert {name: t.dtype for name, t in found.items()} == {
            name: t.dtype for name, t in problem.floating().items()
        }


# Edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", [None, "full", "diag"])
@pytest.mark.parametrize(
    ("rows", "ignored"), [(0, 0.0), (3, 1.0), (9, 1.0)], ids=["empty", "N<C", "N>=C"]
)
def test_nothing_to_learn_from_gives_zeros(rows, ignored, structure, reduction, backend, device):
    problem = random_problem(rows, ignored=ignored, structure=structure, reduction=reduction)
    for loss_of in (fused(backend), eager, reference_loss):
        found = value_and_gradients(loss_of, problem.to(device))
        assert found["loss"].shape == ((rows,) if reduction == "none" else ())
        assert all((t == 0).all() for t in found.values())


def test_one_class_has_no_loss(backend, device):
    problem = random_problem(classes=1)
    found = value_and_gradients(fused(backend), problem.to(device))
    assert all((t == 0).all() for t in found.values())


def test_ignored_rows_count_for_nothing(backend, device):
    problem = random_problem(rows=12, ignored=0.4)
    keep = problem.labels != -100
    assert 0 < keep.sum() < 12
    kept = random_problem(rows=12, ignored=0.4)
    object.__setattr__(kept, "features", problem.features[keep])
    object.__setattr__(kept, "labels", problem.labels[keep])
    object.__setattr__(kept, "epsilon", problem.epsilon[keep])
    whole = value_and_gradients(fused(backend), problem.to(device))
    part = value_and_gradients(fused(backend), kept.to(device))
    for name in ("features", "epsilon"):
        assert (whole[name][~keep] == 0).all()
        whole[name] = whole[name][keep]
    assert_same(whole, part)


def test_special_cases_are_the_losses_they_should_be(backend, device):
    problem = random_problem(structure=None, epsilon=False, log_prior=False).to(device)
    logits = torch.nn.functional.linear(problem.features, problem.weight, problem.bias)
    expected = torch.nn.functional.cross_entropy(logits, problem.labels)
    torch.testing.assert_close(fused(backend)(problem), expected, rtol=1e-13, atol=0)
    adjusted = random_problem(structure=None, epsilon=False).to(device)
    logits = logits + adjusted.options["beta"] * adjusted.log_prior
    expected = torch.nn.functional.cross_entropy(logits, adjusted.labels)
    assert torch.equal(adjusted.features, problem.features)
    torch.testing.assert_close(fused(backend)(adjusted), expected, rtol=1e-13, atol=0)


# Blocks of the torch closed forms -------------------------------------------------------------


@pytest.mark.parametrize("structure", [None, "full", "diag"])
@pytest.mark.parametrize("shape", [(40, 12, 7), (9, 12, 7)], ids=["N>=C", "N<C"])
@pytest.mark.parametrize("elements", [1, 20, 200])
@pytest.mark.parametrize("few_rows", [0, 32])
def test_blocks_do_not_matter(structure, shape, elements, few_rows, block_elements, monkeypatch):
    from iada_kernels.torch_ops import blocking, quadratic

    problem = random_problem(*shape, structure=structure, symmetric=False, reduction="none")
    expected = value_and_gradients(reference_loss, problem)
    block_elements(elements)
    monkeypatch.setattr(quadratic, "FEW_ROWS", few_rows)
    rows, _, width = shape
    assert len(list(blocking.blocks(rows, width))) > (1 if elements < rows * width else 0)
    assert_same(value_and_gradients(fused("torch"), problem), expected)
    assert_same(value_and_gradients(fused("torch"), problem, create_graph=True), expected)


def test_several_blocks_occur(block_elements):
    from iada_kernels.torch_ops import blocking

    block_elements(20)
    assert [(s.start, s.stop) for s in blocking.blocks(5, 7)] == [(0, 2), (2, 4), (4, 5)]
    assert not blocking.is_one_block(5, 7)


# The module -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_module_streams_in_training_only(structure):
    problem = random_problem(rows=30, structure=structure, dtype=torch.float32)
    counts = torch.tensor([50, 20, 5, 0])
    module = iada.IADALoss(4, 5, class_counts=counts, structure=structure, alpha=0.7, beta=0.3)
    call = (problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon)
    state = iada.ClassCovariance(4, 5, structure)
    state.update(problem.features, problem.labels)
    expected = iada.fused_loss(
        *call[:4],
        covariance=state,
        epsilon=problem.epsilon,
        log_prior=iada.log_class_prior(counts),
        alpha=0.7,
        beta=0.3,
    )
    assert torch.equal(module(*call), expected)
    module.eval()
    assert torch.equal(module(*call), expected)
    assert torch.equal(module.covariance.count, state.count)
    module.train()
    module(*call)
    assert torch.equal(module.covariance.count, 2 * state.count)


@pytest.mark.parametrize("class_counts", [None, torch.tensor([9, 5, 3, 1])])
def test_module_state_dict_round_trip(class_counts):
    problem = random_problem(rows=30, dtype=torch.float32)
    call = (problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon)
    module = iada.IADALoss(4, 5, class_counts=class_counts)
    module(*call)
    other_counts = None if class_counts is None else torch.ones(4)
    other = iada.IADALoss(4, 5, class_counts=other_counts)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(*call), module.eval()(*call))


def test_module_trains_the_head_and_anneals_alpha():
    problem = random_problem(rows=30, dtype=torch.float32).map(lambda t: t.requires_grad_())
    module = iada.IADALoss(4, 5, alpha=0.0)
    call = (problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon)
    plain = module(*call)
    plain.backward()
    assert problem.weight.grad.abs().max() > 0
    assert problem.features.grad.abs().max() > 0
    module.alpha = 2.0
    assert module.eval()(*call) > plain


def test_sign_margin_of_the_problems_is_what_it_says():
    problem = random_problem(rows=20, margin=1e-3)
    assert sign_argument(problem).abs().min() > 1e-3 * problem.weight.abs().max()


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_the_loss_module_updates_and_computes_in_one_call(structure, ignore_index, target):
    problem = random_problem(31, 5, 6, structure=None, ignore_index=ignore_index).to(target.device)
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(40, 6, generator=generator).to(target.device)
    classes = (torch.arange(40) % 4).to(target.device)

    def run(module, update):
        weight = problem.weight.clone().requires_grad_()
        features = problem.features.clone().requires_grad_()
        loss = module(features, weight, problem.bias, problem.labels, problem.epsilon)
        version = module.covariance.covariance._version
        if update:
            assert version > 0
        return loss, *torch.autograd.grad(loss, [features, weight])

    def build():
        module = iada.IADALoss(
            5, 6, structure=structure, ignore_index=ignore_index, backend=target.backend
        )
        module = module.double().to(target.device)
        module.covariance.update(history.double(), classes)
        return module

    fused, apart = build(), build()
    found = run(fused, update=True)
    apart.covariance.update(
        problem.features, problem.labels, ignore_index=ignore_index, backend="torch"
    )
    apart.eval()
    for have, want in zip(found, run(apart, update=False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-12)
    for have, want in zip(fused.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-12)
    assert torch.equal(fused.covariance.count.cpu()[4:], apart.covariance.count.cpu()[4:])
