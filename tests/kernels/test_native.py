"""The native CPU operators against the torch closed forms and the reference.

Shapes are those that are hard for blocked code. Every other backend-parametrised test covers them
too; `make sanitize` runs this file and test_native_library.py, on an instrumented library.

Errors are judged against those of the torch closed forms at the same dtype, both relative to the
reference in float64.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iada
from iada_kernels import native, reference, torch_ops
from iada_kernels.contract import (
    ClassStatistics,
    HeadTangents,
    LossInputs,
    LossNeeds,
    LossOptions,
)
from tests.helpers.child import python

needs_library = pytest.mark.skipif(not native.is_available(), reason="no native library here")

# N, C, A: one class, one row, one feature, none, odd sizes around the blocks of 16, 32, 64, 128.
SHAPES = [
    (0, 4, 3),
    (1, 1, 1),
    (5, 1, 9),
    (1, 2, 1),
    (7, 3, 5),
    (33, 100, 17),
    (64, 2, 130),
    (129, 5, 65),
    (31, 130, 33),
    (70, 3, 300),
]
FIELDS = ("features", "weight", "bias", "labels", "covariance", "epsilon", "log_prior")


def inputs(n, c, a, structure="full", ignored=0.1, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, c, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    covariance = None
    if structure == "full":
        factor = normal(c, a, a) / max(1, 2 * a**0.5)
        covariance = factor @ factor.mT
    elif structure == "diag":
        covariance = normal(c, a).square()
    return LossInputs(
        normal(n, a) * scale,
        normal(c, a) / max(1, a) ** 0.5,
        normal(c),
        labels,
        covariance,
        torch.rand(n, generator=generator, dtype=torch.float64) - 0.5,
        normal(c).log_softmax(0),
    )


def cast(given, dtype):
    tensors = [getattr(given, field) for field in FIELDS]
    return LossInputs(
        *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
    )


def evaluate(backend, given, options, upstream):
    needs = LossNeeds(
        given.features is not None,
        True,
        given.bias is not None,
        given.covariance is not None,
        given.epsilon is not None,
        given.log_prior is not None,
    )
    loss, saved = backend.loss_forward(given, options, needs)
    grads = backend.loss_backward(given, options, saved, upstream.to(loss.dtype), needs)
    again = backend.loss_backward(given, options, saved, upstream.to(loss.dtype), needs)
    for field, first in vars(grads).items():
        second = getattr(again, field)
        assert first is second is None or torch.equal(first, second), field
    return {"loss": loss, **vars(grads)}


def distance(found, exact):
    if exact.numel() == 0:
        return 0.0
    return float((found.double() - exact).abs().max())


@needs_library
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("structure", ["full", "diag", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients(shape, structure, reduction, dtype):
    exact = inputs(*shape, structure)
    options = LossOptions(0.5, 1.0, -100, reduction)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(
        (shape[0],) if reduction == "none" else (), generator=generator, dtype=torch.float64
    )
    given = cast(exact, dtype)
    truth = evaluate(torch_ops, cast(given, torch.float64), options, upstream)
    ours = evaluate(native, given, options, upstream)
    torchs = evaluate(torch_ops, given, options, upstream)
    for name, want in truth.items():
        if want is None:
            assert ours[name] is None
            continue
        assert ours[name].dtype == torchs[name].dtype
        assert ours[name].shape == want.shape
        # A few units in the last place of the numbers summed, where torch happens to be exact.
        rounding = (
            64 * torch.finfo(dtype).eps * max(1.0, float(want.abs().max())) if want.numel() else 0
        )
        assert distance(ours[name], want) <= 4 * distance(torchs[name], want) + rounding, name


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_exactly(dtype):
    exact = inputs(40, 6, 37, "full")
    given = cast(exact, dtype)
    given = LossInputs(
        given.features, given.weight, given.bias, given.labels,
        exact.covariance.float(), given.epsilon, given.log_prior,
    )  # fmt: skip
    wide = cast(given, torch.float32)
    options, one = LossOptions(0.5, 1.0, -100, "mean"), torch.ones(())
    ours, same = evaluate(native, given, options, one), evaluate(native, wide, options, one)
    for name, found in ours.items():
        want = same[name].to(dtype) if name == "features" else same[name]
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    ours, same = hypergradients(native, given), hypergradients(native, wide)
    assert all(torch.equal(ours[name], same[name]) for name in ours)


@needs_library
def test_half_conversions_cover_every_number():
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        finite = every[every.isfinite()][:, None]
        state = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        for value in finite[::97]:  # with one row the mean is the row itself
            covariance, mean, count = (tensor.clone() for tensor in state)
            native.covariance_update(
                covariance, mean, count, value[None], torch.zeros(1, dtype=torch.int64)
            )
            assert mean.item() == value.float().item()


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_low_precision_are_not_written_as_others(dtype):
    """In place all the same, by way of float32; the operator itself refuses them."""
    state = [torch.zeros(3, 8, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype)]
    count = torch.zeros(3, dtype=torch.int64)
    features, labels = torch.randn(20, 8), torch.arange(20) % 3
    zeros = [torch.zeros(3, 8, 8), torch.zeros(3, 8), count.clone()]
    whole = reference.covariance_update(*zeros, features, labels)
    native.covariance_update(*state, count, features, labels)
    for low, high in zip(state, whole, strict=False):
        torch.testing.assert_close(low, high.to(dtype), rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="expected statistics in float32 or float64"):
        torch.ops.iada_native.covariance_update(*state, count, features, labels)


@needs_library
@pytest.mark.parametrize("full", [True, False], ids=["full", "diag"])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 10, 64), (1200, 2, 140), (64, 2, 200)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_covariance_update(shape, full, offset, dtype):
    n, c, a = shape
    generator = torch.Generator().manual_seed(4)
    batches = [
        (
            (torch.randn(n, a, generator=generator, dtype=torch.float64) + offset).to(dtype),
            torch.randint(-1, c + 1, (n,), generator=generator),
        )
        for _ in range(3)
    ]
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def stream(update, kind):
        held = [
            torch.zeros(c, a, a, dtype=kind) if full else torch.zeros(c, a, dtype=kind),
            torch.zeros(c, a, dtype=kind),
            torch.zeros(c, dtype=torch.int64),
        ]
        for features, labels in batches:
            if update is reference.covariance_update:
                kept = (labels >= 0) & (labels < c)
                held = list(update(*held, features[kept].double(), labels[kept]))
            else:
                update(*held, features, labels)
        return held

    truth = stream(reference.covariance_update, torch.float64)
    ours, torchs = (
        stream(native.covariance_update, state),
        stream(torch_ops.covariance_update, state),
    )
    assert torch.equal(ours[2], truth[2])
    for found, other, want in list(zip(ours, torchs, truth, strict=True))[:2]:
        size = max(1.0, float(want.abs().max()), offset)
        rounding = 16 * torch.finfo(state).eps * size
        assert distance(found, want) <= 4 * distance(other, want) + rounding
    if full:
        assert torch.equal(ours[0], ours[0].mT)


@needs_library
def test_absent_classes_keep_their_bits():
    covariance, mean = torch.randn(3, 5, 5), torch.randn(3, 5)
    count = torch.tensor([3, 4, 5])
    before = covariance.clone(), mean.clone()
    native.covariance_update(
        covariance, mean, count, torch.randn(8, 5), torch.ones(8, dtype=torch.int64)
    )
    for c in (0, 2):
        assert torch.equal(covariance[c], before[0][c])
        assert torch.equal(mean[c], before[1][c])
    assert count.tolist() == [3, 12, 5]


@needs_library
def test_extreme_values():
    """Margins of ±200 and huge logits: finite, and as exact as torch."""
    given = cast(inputs(60, 7, 20, "full", scale=200.0), torch.float32)
    exact = cast(given, torch.float64)
    options, one = LossOptions(0.5, 1.0, -100, "sum"), torch.ones((), dtype=torch.float64)
    ours, torchs = (evaluate(b, given, options, one) for b in (native, torch_ops))
    truth = evaluate(torch_ops, exact, options, one)
    for name, want in truth.items():
        assert ours[name].isfinite().all(), name
        rounding = 64 * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert distance(ours[name], want) <= 4 * distance(torchs[name], want) + rounding, name


@needs_library
def test_labels_out_of_range_are_refused_by_the_operator_itself():
    given = cast(inputs(6, 3, 4, ignored=0.0), torch.float32)
    labels = given.labels.clone()
    labels[2] = 3
    broken = given._replace(labels=labels)
    options, needs = LossOptions(0.5, 1.0, -100, "mean"), LossNeeds(*[False] * 6)
    stream = ClassStatistics(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    before = given.covariance.clone()
    for state in (None, stream):
        with pytest.raises(RuntimeError, match=r"labels.*\[0, 3\).*got 3 at row 2"):
            native.loss_forward(broken, options, needs, state)
    assert not stream.count.any()
    assert torch.equal(given.covariance, before)
    with pytest.raises(RuntimeError, match=r"labels.*\[0, 3\)"):
        native.characteristics(given.features, torch.zeros(6, 3), labels, given.weight, 2)


def hypergradients(backend, given, reduction="mean"):
    """∂L̇/∂ε and ∂L̇/∂Σ along a fixed direction."""
    dtype = given.compute_dtype
    generator = torch.Generator().manual_seed(5)
    tangents = HeadTangents(
        *(
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)
            for t in (given.features, given.weight, given.bias)
        )
    )
    options = LossOptions(0.7, 1.0, -100, reduction)
    epsilon, sums = backend.hypergradient(given, options, tangents, given.covariance is not None)
    if given.covariance is None:
        assert sums is None
        return {"epsilon": epsilon}
    stepped = torch.zeros_like(given.covariance)
    backend.covariance_step(stepped, given.weight, tangents.weight, sums, -0.5)
    return {"epsilon": epsilon, "covariance": stepped}


@needs_library
@pytest.mark.parametrize("structure", ["full", "asymmetric", "diag", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1), (torch.float32, 200), (torch.float64, 1)]
)
def test_hypergradient(shape, structure, dtype, scale):
    exact = inputs(*shape, "full" if structure == "asymmetric" else structure, scale=scale)
    if structure == "asymmetric":
        exact = exact._replace(covariance=exact.covariance.triu())
    given = cast(exact, dtype)
    logits = exact.features @ exact.weight.T
    largest = distance(torch.zeros(()), logits)
    for reduction in ("mean", "sum"):
        truth = hypergradients(torch_ops, cast(given, torch.float64), reduction)
        ours, torchs = (hypergradients(b, given, reduction) for b in (native, torch_ops))
        for name, want in truth.items():
            found, size = ours[name], float(want.abs().max()) if want.numel() else 0.0
            assert found.isfinite().all()
            # Rounding of logits moves every probability by a share of their size.
            rounding = torch.finfo(dtype).eps * max(64, 4 * largest) * max(1.0, size)
            assert distance(found, want) <= 4 * distance(torchs[name], want) + rounding, name
        if structure in ("full", "asymmetric"):
            assert torch.equal(ours["covariance"], ours["covariance"].mT)


def with_logits(given):
    labels = given.labels.clamp(min=0)
    logits = (given.features.to(given.compute_dtype) @ given.weight.T).to(given.features.dtype)
    return given.features, logits, labels, given.weight


@needs_library
@pytest.mark.parametrize("shape", [*SHAPES, (70, 5, 40)], ids=str)
@pytest.mark.parametrize("neighbours", [1, 5, 64, 65])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_characteristics(shape, neighbours, scale):
    given = with_logits(inputs(*shape, "none", ignored=0.0, scale=scale))
    want = reference.batch_characteristics(*given, neighbours)
    found = native.characteristics(*given, neighbours)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)
    single = with_logits(cast(inputs(*shape, "none", ignored=0.0, scale=scale), torch.float32))
    assert native.characteristics(*single, neighbours).isfinite().all()


@needs_library
def test_characteristics_of_masked_logits():
    features, logits, labels, weight = with_logits(inputs(20, 6, 4, "none", ignored=0.0))
    logits[:, 3], logits[3], labels[labels == 3] = -torch.inf, 0.0, 2
    found = native.characteristics(features, logits, labels, weight, 3)
    want = reference.batch_characteristics(features, logits, labels, weight, 3)
    torch.testing.assert_close(found[:, [0, 1, 2, 6]], want[:, [0, 1, 2, 6]])
    assert found.isfinite().all()


@needs_library
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 3, 900)], ids=str)  # 900: Σ is taken in groups
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_and_update_in_one_call(shape, structure, dtype):
    """The same bits as the update and then the loss."""
    given = cast(inputs(*shape, structure), dtype)
    given = given._replace(
        covariance=given.covariance.to(torch.promote_types(dtype, torch.float32))
    )
    options, needs = LossOptions(0.5, 1.0, -100, "mean"), LossNeeds(*[True] * 6)
    classes, width = given.weight.shape

    def run(apart):
        sigma = given.covariance.clone()
        mean = torch.ones(classes, width, dtype=sigma.dtype)
        stream = ClassStatistics(mean, torch.arange(classes))
        held = given._replace(covariance=sigma)
        if apart:
            native.covariance_update(sigma, mean, stream.count, held.features, held.labels)
        version = sigma._version
        loss, saved = native.loss_forward(held, options, needs, None if apart else stream)
        assert apart or sigma._version > version
        grads = native.loss_backward(held, options, saved, torch.ones_like(loss), needs)
        return sigma, mean, stream.count, loss, *vars(grads).values()

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


@needs_library
def test_arguments_that_fit_are_recognised():
    given = cast(inputs(6, 3, 4, ignored=0.3), torch.float32)

    def fit(streams=True, **changed):
        tensors = {field: getattr(given, field) for field in FIELDS} | changed
        return native.arguments_fit(LossInputs(**tensors), -100, streams)

    assert fit()
    assert fit(bias=None, covariance=None, epsilon=None, log_prior=None)
    assert fit(covariance=torch.ones(3, 4, dtype=torch.float64))
    spoilt = {field: getattr(given, field).clone() for field in ("features", "epsilon", "labels")}
    spoilt["features"][5, 3] = torch.nan
    spoilt["epsilon"][0] = -torch.inf
    spoilt["labels"][1] = 3
    for field, tensor in spoilt.items():
        assert not fit(**{field: tensor}), field
    assert fit(streams=False, features=spoilt["features"])
    for field in FIELDS:
        tensor = getattr(given, field)
        bad = (tensor[..., :-1], tensor[None], tensor.to(torch.int16), tensor.tolist(), 1.0)
        for wrong in (*bad, tensor.to("meta"), tensor.to(torch.complex64)):
            assert not fit(**{field: wrong}), field
    assert not fit(features=given.features.double())  # may overflow in float32 statistics
    for field in ("covariance", "features", "labels", "weight"):
        assert not fit(**{field: getattr(given, field)[:0]})


@needs_library
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_number_of_threads_changes_nothing(structure):
    given = cast(inputs(700, 40, 96, structure), torch.float32)
    options, one = LossOptions(0.5, 1.0, -100, "mean"), torch.ones(())
    rows, results, states = with_logits(given), [], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(
                evaluate(native, given, options, one)
                | {f"d{name}": tensor for name, tensor in hypergradients(native, given).items()}
                | {"traits": native.characteristics(*rows, 5)}
            )
            state = torch.zeros_like(given.covariance), torch.zeros(40, 96), torch.zeros(40).long()
            native.covariance_update(*state, given.features, given.labels)
            states.append(state)
    finally:
        torch.set_num_threads(threads)
    for result, state in zip(results[1:], states[1:], strict=True):
        for name, found in result.items():
            assert torch.equal(found, results[0][name]), name
        assert all(map(torch.equal, state, states[0]))


@needs_library
def test_strided_inputs():
    given = cast(inputs(20, 5, 12, "full"), torch.float32)
    strided = LossInputs(
        *(
            t if f == "labels" else torch.stack([t, t], dim=-1)[..., 0]
            for f, t in ((f, getattr(given, f)) for f in FIELDS)
        )
    )
    options, one = LossOptions(0.5, 1.0, -100, "mean"), torch.ones(())
    for compute in (
        lambda g: evaluate(native, g, options, one),
        lambda g: hypergradients(native, g),
    ):
        plain, other = compute(given), compute(strided)
        for name, found in other.items():
            assert torch.equal(found, plain[name]), name


@pytest.fixture
def medium_precision():
    """torch's leave to multiply float32 as bfloat16; taken back at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def rounds_here():
    """Whether products of operands rounded to bfloat16 are compiled for this processor."""
    with contextlib.suppress(OSError):
        has = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
        return has and native.is_available() and native.instruction_set() == "avx512"
    return False


def loss_and_gradients(p, **options):
    leaves = {n: t.clone().requires_grad_() for n, t in p._asdict().items() if n != "labels"}
    loss = iada.fused_loss(labels=p.labels, alpha=1.0, backend="native", **leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))]


@needs_library
@pytest.mark.parametrize("size", [(33, 100, 17), (31, 130, 33), (40, 7, 300), (9, 4, 1)])
def test_products_of_rounded_operands(size, medium_precision):
    """The form of the rounded differences with the rounded Σ, to the rounding of float32 sums."""
    p = inputs(*size, ignored=0.0)._replace(epsilon=None)
    p = p._replace(
        **{n: t.float() for n, t in p._asdict().items() if t is not None and n != "labels"}
    )
    p = p._replace(epsilon=torch.zeros(size[0]))
    losses = loss_and_gradients(p, reduction="none")[0]
    rounded = p.covariance.bfloat16().double()
    delta = p.weight[None] - p.weight[p.labels][:, None]
    forms = (delta.bfloat16().double() @ rounded[p.labels] * delta.double()).sum(dim=2) / 2
    plain = torch.nn.functional.linear(p.features.double(), p.weight.double(), p.bias.double())
    want = torch.nn.functional.cross_entropy(
        plain + forms + p.log_prior.double(), p.labels, reduction="none"
    )
    if not rounds_here():
        pytest.skip("this processor multiplies float32 as it is")
    torch.testing.assert_close(losses.double(), want, rtol=3e-6, atol=3e-6)


@needs_library
def test_what_is_not_rounded(medium_precision):
    """Products of float64, a diagonal Σ, up to three classes; none where it was not asked."""
    full, few = inputs(20, 30, 40), inputs(20, 3, 40)
    single = [full, few, inputs(20, 30, 40, "diag")]
    single = [
        p._replace(**{n: t.float() for n, t in p._asdict().items() if n != "labels"})
        for p in single
    ]
    cases = [full, *single]
    rounded = [loss_and_gradients(p) for p in cases]
    torch.set_float32_matmul_precision("high")
    plain = [loss_and_gradients(p) for p in cases]
    same = [all(map(torch.equal, r, q)) for r, q in zip(rounded, plain, strict=True)]
    assert same == [True, not rounds_here(), True, True]
    errors = [(r - q).norm() / q.norm() for r, q in zip(rounded[1], plain[1], strict=True)]
    assert max(errors) < 2**-8


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its address space")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the sanitizers reserve address space")
def test_scratch_that_memory_has_no_room_for_is_an_error():
    """And not the end of the process."""
    code = """
import resource, torch
from iada_kernels import native
torch.set_num_threads(1)
features = torch.ones(50_000, 1024, dtype=torch.bfloat16)  # its copy takes 200 MB
labels = torch.zeros(50_000, dtype=torch.int64)
arguments = (features, torch.zeros(50_000, 2), labels, torch.ones(2, 1024))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    native.characteristics(*arguments, 1)
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "native: expected 204" in done.stdout
    assert "bytes of memory for scratch" in done.stdout


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the sanitizers hold memory of their own")
def test_memory_at_the_dense_shape():
    """N=131072, C=19, A=256: beyond inputs and gradients, at most twice N×C floats."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--threads", "2", "--memory-of", "dense"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) <= 2 * 4 * 131072 * 19
