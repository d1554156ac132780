"""The streamed low-rank covariance: its diagonal is exact, and the rest within the stated bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iada
from iada_kernels import reference, torch_ops
from iada_kernels.low_rank import unpacked
from iada_kernels.torch_ops import low_rank_update
from tests.helpers.problems import max_norm
from tests.nn.test_covariance import (
    assert_same_bits,
    bits,
    population,
    random_stream,
    skewed_stream,
)
from tests.nn.test_loss_gradients import NoHostReads

pytestmark = pytest.mark.usefixtures("one_thread")


def streamed(features, labels, classes, rank, *, step=11, dtype=torch.float64):
    """A covariance that took in the rows, `step` at a time."""
    state = iada.ClassCovariance(classes, features.shape[1], "low-rank", rank).to(dtype=dtype)
    for h, y in zip(features.split(step), labels.split(step), strict=True):
        state.update(h, y)
    return state


@pytest.fixture(params=["eigenvectors", "subspace"])
def path(request, monkeypatch):
    """The path of CPUs, and that of accelerators."""
    if request.param == "subspace":
        monkeypatch.setattr(low_rank_update, "counts_classes", lambda labels: False)
    return request.param


def assert_within_the_bound(state, expected, rounding):
    """The diagonal to rounding, all else within √(d_a d_b) and, in norm, within Σ_a d_a."""
    full, diagonal = expected["covariance"], state.low_rank.diagonal.double()
    assert torch.equal(state.count, expected["count"])
    assert (diagonal >= 0).all()
    scale = max(1.0, max_norm(full))
    mean_scale = max(scale**0.5, max_norm(expected["mean"]))
    assert max_norm(state.mean.double() - expected["mean"]) <= rounding * mean_scale
    variances = full.diagonal(dim1=1, dim2=2)
    assert max_norm(state.variances.double() - variances) <= rounding * scale
    error = (state.dense().double() - full).abs()
    bound = (diagonal[:, :, None] * diagonal[:, None, :]).sqrt()
    assert (error <= bound + rounding * scale).all()
    norm = torch.linalg.matrix_norm(state.dense().double() - full, 2)
    assert (norm <= diagonal.sum(dim=1) + rounding * scale * full.shape[1]).all()
    return norm


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(0, 60), st.integers(1, 5), st.integers(1, 7)),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
    rank=st.integers(0, 9),
    step=st.integers(1, 60),
)
def test_stays_within_the_bound_and_a_whole_rank_is_exact(sizes, ignored, seed, rank, step):
    features, labels = random_stream(*sizes, ignored, seed)
    _, classes, width = sizes
    state = streamed(features, labels, classes, rank, step=step)
    expected = population(features, labels, classes, "full")
    norm = assert_within_the_bound(state, expected, 1e-12)
    if rank >= width:
        assert max_norm(norm) <= 1e-12 * max(1.0, max_norm(features)) ** 2


@pytest.mark.parametrize("rank", [1, 3, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_paths_stay_within_the_bound(rank, dtype, path):
    features, labels = random_stream(200, 4, 6, ignored=0.1)
    state = streamed(features, labels, 5, rank, step=23, dtype=dtype)
    expected = population(features, labels, 5, "full")
    rounding = 1e-12 if dtype is torch.float64 else 2e-5
    norm = assert_within_the_bound(state, expected, rounding)
    if rank >= 6:
        assert max_norm(norm) <= 5 * rounding * max_norm(expected["covariance"])
    assert (state.covariance[4] == 0).all()


@pytest.mark.parametrize("rank", [0, 1, 3, 5, 8])
def test_equals_the_reference_step(rank):
    features, labels = random_stream(40, 4, 5)
    state = iada.ClassCovariance(4, 5, "low-rank", rank).double()
    expected = tuple(bits(state).values())
    for part in (slice(0, 25), slice(25, 40)):
        state.update(features[part], labels[part])
        expected = reference.covariance_update(*expected, features[part], labels[part])
    want = unpacked(expected[0], 5)
    torch.testing.assert_close(state.low_rank.diagonal, want.diagonal, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.dense(), want.dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.mean, expected[1])
    assert torch.equal(state.count, expected[2])


def test_the_subspace_is_nearly_the_best(monkeypatch):
    """What the iteration of accelerators leaves to the diagonal, beside what must be left."""
    features, labels = skewed_stream(rows=4000, width=24)
    best = streamed(features, labels, 10, 8, step=100, dtype=torch.float32)
    monkeypatch.setattr(low_rank_update, "counts_classes", lambda labels: False)
    found = streamed(features, labels, 10, 8, step=100, dtype=torch.float32)
    left, must = (state.low_rank.diagonal.sum(dim=1) for state in (found, best))
    assert (left <= 1.1 * must).all(), (left / must).tolist()


def test_rank_0_is_the_diagonal_structure():
    features, labels = random_stream(40, 4, 5)
    states = [iada.ClassCovariance(4, 5, *kind) for kind in (("diag",), ("low-rank", 0))]
    for state in states:
        state.update(features, labels)
    assert_same_bits(states[1], bits(states[0]))
    assert torch.equal(states[1].dense(), states[0].dense())


@pytest.mark.parametrize("step", [90, 45])  # of the second batch the mean is another
@pytest.mark.parametrize("scratch", [1, 2**24])
def test_many_rows_of_a_class_are_taken_in_a_part_at_a_time(path, scratch, step, monkeypatch):
    monkeypatch.setattr(low_rank_update, "MOST_ROWS", 7)
    monkeypatch.setattr(low_rank_update, "MOST_SCRATCH", scratch)
    features, labels = random_stream(90, 2, 30)
    state = streamed(features, labels, 2, 4, step=step)
    assert_within_the_bound(state, population(features, labels, 2, "full"), 1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_long_stream_in_single_precision(offset):
    features, labels = skewed_stream(rows=20_000, offset=offset)
    state = streamed(features, labels, 10, 6, step=128, dtype=torch.float32)
    assert_within_the_bound(state, population(features, labels, 10, "full"), 2e-4)


def test_what_is_alike_in_every_batch_stays_in_few_directions():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 3, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (400,), generator=generator)
    spread = torch.randn(400, 1, 3, generator=generator, dtype=torch.float64)
    features = (spread @ mix[labels])[:, 0]
    state = streamed(features, labels, 3, 3, step=32)
    assert max_norm(state.dense() - population(features, labels, 3, "full")["covariance"]) < 1e-11


def test_absent_classes_keep_their_bits(path):
    features, labels = random_stream(60, 4, 5)
    state = streamed(features, labels, 6, 3, dtype=torch.float32)
    before = bits(state)
    state.update(features[:9], torch.full((9,), 1))
    for name, tensor in bits(state).items():
        kept = torch.arange(6) != 1
        assert torch.equal(tensor[kept], before[name][kept]), name
        assert not torch.equal(tensor[1], before[name][1]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_features_leave_the_state_untouched(bad):
    features, labels = random_stream(30, 4, 5)
    state = streamed(features, labels, 4, 3)
    before, features = bits(state), features.clone()
    features[7, 2] = bad
    with pytest.raises(ValueError, match="^features: expected finite"):
        state.update(features, labels)
    assert_same_bits(state, before)


def test_callers_tensors_and_autocast_change_nothing():
    features, labels = random_stream(30, 4, 5)
    features = features.float()
    kept = features.clone()
    plain = streamed(features, labels, 4, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = streamed(features, labels, 4, 3, dtype=torch.float32)
    assert_same_bits(inside, bits(plain))
    assert torch.equal(features, kept)


def test_the_path_of_accelerators_reads_nothing_on_the_host(monkeypatch):
    monkeypatch.setattr(low_rank_update, "counts_classes", lambda labels: False)
    features, labels = random_stream(40, 4, 5)
    state = iada.ClassCovariance(4, 5, "low-rank", 2).double()
    with NoHostReads():
        torch_ops.covariance_update(state.covariance, state.mean, state.count, features, labels)
    assert_within_the_bound(state, population(features, labels, 4, "full"), 1e-12)


def test_it_runs_without_data():
    state = iada.ClassCovariance(4, 5, "low-rank", 2).to("meta")
    features, labels = random_stream(40, 4, 5)
    state.update(features.to("meta"), labels.to("meta"))


def test_the_loss_is_within_half_alpha_of_the_bound():
    """|Δℓ| ≤ ½ α max_j Σ_a d_a ‖w_j − w_y‖²: a quadratic form of F − diag(F), F ⪰ 0, tr F = Σ d."""
    features, labels = random_stream(300, 4, 8)
    weight = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = population(features, labels, 4, "full")["covariance"]
    for rank in (1, 3, 6):
        state = streamed(features, labels, 4, rank)
        losses = [
            iada.fused_loss(features, weight, None, labels, covariance=sigma, reduction="none")
            for sigma in (full, state)
        ]
        far = (weight[:, None] - weight).square().sum(dim=2).amax(dim=1)
        bound = 0.25 * state.low_rank.diagonal.sum(dim=1) * far
        assert ((losses[1] - losses[0]).abs() <= bound[labels] + 1e-12).all()
