"""The streaming class covariance against the statistics of everything it has seen."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iada
from iada.nn import class_covariance
from iada.utils import checks
from iada_kernels import reference, torch_ops
from iada_kernels.torch_ops import covariance as torch_ops_covariance
from iada_kernels.torch_ops import low_rank_update
from tests.helpers.problems import LAYOUTS, lay_out, max_norm
from tests.nn.test_loss_gradients import NoHostReads

pytestmark = pytest.mark.usefixtures("one_thread")

STRUCTURES = pytest.mark.parametrize("structure", ["full", "diag"])
BUFFERS = ("covariance", "mean", "count")


def random_stream(rows, classes, width, ignored=0.0, seed=0, ignore_index=-100):
    """Correlated features around class means of order 1, and labels, of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    labels = torch.randint(classes, (rows,), generator=generator)
    features = normal(rows, width) @ normal(width, width) + 3 * normal(classes, width)[labels]
    labels[torch.rand(rows, generator=generator) < ignored] = ignore_index
    return features, labels


def skewed_stream(rows=100_000, classes=10, width=16, offset=0.0, seed=0):
    """float32 features with long-tailed labels, 100:1, and class means around ±`offset`."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.01 ** (torch.arange(classes) / (classes - 1))
    labels = torch.multinomial(share, rows, replacement=True, generator=generator)
    mix = torch.randn(classes, width, width, generator=generator) / width**0.5
    means = torch.randn(classes, width, generator=generator).sign() * offset
    features = torch.empty(rows, width)
    for c in range(classes):
        mine = labels == c
        noise = torch.randn(int(mine.sum()), width, generator=generator)
        features[mine] = noise @ mix[c] + means[c]
    return features, labels


def population(features, labels, classes, structure):
    """Covariance, mean and count in float64, in one look."""
    found = reference.population_statistics(features.double(), labels, classes, structure == "diag")
    return dict(zip(BUFFERS, found, strict=True))


def new_state(classes, width, structure, device="cpu", dtype=torch.float32):
    return iada.ClassCovariance(classes, width, structure).to(device=device, dtype=dtype)


def assert_state(state, expected, tolerance, mean_tolerance=None):
    """Relative to the largest number of each class; a mean also to its spread."""
    tolerances = {"covariance": tolerance, "mean": mean_tolerance or tolerance}
    assert torch.equal(state.count.cpu(), expected["count"])
    sigma = expected["covariance"].flatten(1).abs().amax(dim=1)
    mean = expected["mean"].abs().amax(dim=1)
    for name, scale in {"covariance": sigma, "mean": torch.maximum(mean, sigma.sqrt())}.items():
        found = getattr(state, name).cpu().double()
        error = (found - expected[name]).flatten(1).abs().amax(dim=1)
        worst = (error / scale.clamp(min=1e-300)).max()
        assert worst <= tolerances[name], f"{name}: {worst:.2e}"


def bits(state):
    return {name: getattr(state, name).clone() for name in BUFFERS}


def assert_same_bits(state, kept):
    assert all(torch.equal(getattr(state, name), kept[name]) for name in BUFFERS)


# What it equals -------------------------------------------------------------------------------


splits = given(
    stream=st.fixed_dictionaries(
        {
            "rows": st.integers(0, 60),
            "classes": st.integers(1, 6),
            "width": st.integers(1, 7),
            "ignored": st.sampled_from([0.0, 0.3, 1.0]),
            "seed": st.integers(0, 10**6),
        }
    ),
    structure=st.sampled_from(["full", "diag"]),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)


@splits
def test_equals_population_statistics_however_split(stream, structure, cuts, compiled_target):
    assert_population(stream, structure, cuts, *compiled_target)


def assert_population(stream, structure, cuts, backend, device):
    """However the stream is cut, the state is what all of it has."""
    features, labels = random_stream(**stream)
    classes, width = stream["classes"], stream["width"]
    state = new_state(classes, width, structure, device, torch.float64)
    borders = [0, *sorted(min(cut, len(labels)) for cut in cuts), len(labels)]
    for start, stop in zip(borders, borders[1:], strict=False):
        part = features[start:stop].to(device), labels[start:stop].to(device)
        state.update(*part, backend=backend)
    # A class of one row has a covariance of 0, of which only rounding of the features is left.
    expected = population(features, labels, classes, structure)
    assert torch.equal(state.count.cpu(), expected["count"])
    scale = max(1.0, max_norm(features)) ** 2
    assert max_norm(state.covariance.cpu() - expected["covariance"]) <= 1e-12 * scale
    assert max_norm(state.mean.cpu() - expected["mean"]) <= 1e-12 * scale


@STRUCTURES
def test_equals_the_reference_step(structure, backend, device):
    features, labels = random_stream(40, 5, 6)
    state = new_state(5, 6, structure, device, torch.float64)
    expected = tuple(bits(state)[name].cpu() for name in BUFFERS)
    for part in (slice(0, 25), slice(25, 40)):
        state.update(features[part].to(device), labels[part].to(device), backend=backend)
        expected = reference.covariance_update(*expected, features[part], labels[part])
    assert_state(state, dict(zip(BUFFERS, expected, strict=True)), 1e-13)


@STRUCTURES
def test_long_skewed_stream_in_float32(structure, compiled_target):
    backend, device = compiled_target
    features, labels = skewed_stream()
    state = new_state(10, 16, structure, device)
    for h, y in zip(features.split(512), labels.split(512), strict=True):
        state.update(h.to(device), y.to(device), backend=backend)
    assert_state(state, population(features, labels, 10, structure), 2e-5)


@STRUCTURES
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 2e-5), (1e3, 2e-4)])
def test_one_row_at_a_time(structure, offset, tolerance, compiled_target):
    backend, device = compiled_target
    features, labels = skewed_stream(rows=2000, offset=offset)
    state = new_state(10, 16, structure, device)
    for h, y in zip(features.to(device).split(1), labels.to(device).split(1), strict=True):
        state.update(h, y, backend=backend)
    assert_state(state, population(features, labels, 10, structure), tolerance)


@STRUCTURES
@pytest.mark.parametrize("batch", [512, 100_000])
def test_large_means_do_not_cancel(structure, batch, compiled_target):
    """|μ| = 1000 times the spread: E[hhᵀ] − μμᵀ in float32 would keep no digit of Σ.

    The yardstick is the float64 population of the float32 features. The running mean is rounded
    to 2⁻¹⁵ at each batch; that enters Σ to second order, or times a shift of either sign:
    3e-5 of Σ after 800 batches. A float32 sum of one large batch would be off by 1e-5 of μ.
    """
    backend, device = compiled_target
    features, labels = skewed_stream(offset=1e3)
    state = new_state(10, 16, structure, device)
    for h, y in zip(features.split(batch), labels.split(batch), strict=True):
        state.update(h.to(device), y.to(device), backend=backend)
    assert_state(state, population(features, labels, 10, structure), 2e-4, mean_tolerance=2e-6)


@STRUCTURES
def test_double_keeps_double_precision(structure, backend, device):
    features, labels = random_stream(500, 4, 5)
    state = iada.ClassCovariance(4, 5, structure).double().to(device)
    for h, y in zip(features.split(33), labels.split(33), strict=True):
        state.update(h.to(device), y.to(device), backend=backend)
    assert_state(state, population(features, labels, 4, structure), 1e-13)


@STRUCTURES
@pytest.mark.parametrize("ignore_index", [255, 0, 2])
def test_ignored_rows_are_left_out(structure, ignore_index, backend, device):
    features, labels = random_stream(50, 4, 5, ignored=0.3, ignore_index=ignore_index)
    keep = labels != ignore_index
    features[~keep] *= 100
    state, kept = (new_state(4, 5, structure, device, torch.float64) for _ in range(2))
    state.update(features.to(device), labels.to(device), ignore_index=ignore_index, backend=backend)
    kept.update(features[keep].to(device), labels[keep].to(device), backend=backend)
    assert_state(state, {name: t.cpu() for name, t in bits(kept).items()}, 1e-14)


@STRUCTURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absent_classes_keep_their_bits(structure, dtype, backend, device):
    features, labels = random_stream(60, 6, 5)
    state = new_state(6, 5, structure, device, dtype)
    state.update(features.to(device), labels.to(device), backend=backend)
    kept = bits(state)
    present = torch.tensor([1, 4])
    labels = present[labels % 2]
    state.update(1e3 * features.to(device), labels.to(device), backend=backend)
    for c in range(6):
        same = [torch.equal(getattr(state, name)[c], kept[name][c]) for name in BUFFERS]
        assert same == [c not in present] * 3


@STRUCTURES
def test_what_is_replaced_leaves_no_rounding_behind(structure, backend, device):
    """A class that has no samples yet takes the batch's Σ, however large what stood there was."""
    features, labels = random_stream(30, 2, 5)
    state = new_state(2, 5, structure, device)
    state.covariance.fill_(1e8)
    state.update(features.to(device), labels.to(device), backend=backend)
    assert_state(state, population(features.float(), labels, 2, structure), 1e-5)


@STRUCTURES
def test_an_empty_batch_changes_nothing(structure, backend, device):
    features, labels = random_stream(60, 4, 5)
    state = new_state(4, 5, structure, device)
    state.update(features.to(device), labels.to(device), backend=backend)
    kept = bits(state)
    state.update(features[:0].to(device), labels[:0].to(device), backend=backend)
    state.update(features.to(device), torch.full_like(labels, -100).to(device), backend=backend)
    assert_same_bits(state, kept)


def test_covariance_stays_symmetric_within_rounding(compiled_target):
    backend, device = compiled_target
    features, labels = skewed_stream(rows=5000)
    state = new_state(10, 16, "full", device)
    for h, y in zip(features.split(7), labels.split(7), strict=True):
        state.update(h.to(device), y.to(device), backend=backend)
    skew = state.covariance - state.covariance.mT
    assert max_norm(skew) <= 1e-5 * max_norm(state.covariance)
    assert torch.linalg.eigvalsh(state.covariance.double()).min() > -1e-5


# What it takes --------------------------------------------------------------------------------


@STRUCTURES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_feature_dtypes_and_strides(structure, dtype, layout, backend, device):
    features, labels = random_stream(50, 4, 5)
    features = lay_out(features.to(dtype), layout)
    kept = features.clone(), labels.clone()
    state = new_state(4, 5, structure, device)
    state.update(features.to(device), labels.to(device), backend=backend)
    assert state.covariance.dtype == torch.float32
    assert_state(state, population(features, labels, 4, structure), 1e-5)
    assert torch.equal(features, kept[0])
    assert torch.equal(labels, kept[1])


@pytest.mark.parametrize(
    "label_dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32]
)
def test_label_dtypes(label_dtype, backend, device):
    features, labels = random_stream(50, 4, 5)
    state = new_state(4, 5, "full", device)
    state.update(features.to(device), labels.to(label_dtype).to(device), backend=backend)
    assert torch.equal(state.count.cpu(), labels.bincount(minlength=4))


@STRUCTURES
def test_arguments_are_not_changed_and_no_graph_is_kept(structure, backend, device):
    features, labels = random_stream(50, 4, 5, ignored=0.2)
    features = features.float().to(device).requires_grad_()
    labels = labels.to(device)
    kept = features.detach().clone(), labels.clone()
    versions = features._version, labels._version
    state = new_state(4, 5, structure, device)
    state.update(features * 1, labels, backend=backend)
    state.update(features, labels, backend=backend)
    assert not any(getattr(state, name).requires_grad for name in BUFFERS)
    assert (features._version, labels._version) == versions
    assert torch.equal(features, kept[0])
    assert torch.equal(labels, kept[1])


def overflowing(features):
    """Finite in float64, infinite in the float32 that the state is kept in."""
    return features.double().fill_(1e300)


BAD_BATCHES = {
    "nan": lambda h, y: (h.index_fill(0, torch.tensor([3]), torch.nan), y),
    "inf": lambda h, y: (h.index_fill(0, torch.tensor([3]), torch.inf), y),
    "-inf": lambda h, y: (h.index_fill(1, torch.tensor([0]), -torch.inf), y),
    "overflow": lambda h, y: (overflowing(h), y),
    "narrow": lambda h, y: (h[:, :-1], y),
    "flat": lambda h, y: (h[:, 0], y),
    "integer features": lambda h, y: (h.long(), y),
    "label too large": lambda h, y: (h, y.index_fill(0, torch.tensor([2]), 4)),
    "label negative": lambda h, y: (h, y.index_fill(0, torch.tensor([2]), -1)),
    "uint8 label too large": lambda h, y: (h, y.byte().index_fill(0, torch.tensor([2]), 156)),
    "float labels": lambda h, y: (h, y.float()),
    "bool labels": lambda h, y: (h, y.bool()),
    "too few labels": lambda h, y: (h, y[:-1]),
    "one-hot labels": lambda h, y: (h, torch.nn.functional.one_hot(y, 4)),
    "list of labels": lambda h, y: (h, y.tolist()),
    "list of features": lambda h, y: (h.tolist(), y),
    "features elsewhere": lambda h, y: (h.to("meta"), y),
    "labels elsewhere": lambda h, y: (h, y.to("meta")),
}


@STRUCTURES
@pytest.mark.parametrize("spoil", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_batch_is_refused_and_leaves_every_bit(structure, spoil):
    features, labels = random_stream(30, 4, 5)
    features = features.float()
    state = new_state(4, 5, structure)
    state.update(features, labels)
    kept = bits(state)
    with pytest.raises(ValueError, match=r"^(features|labels): expected .+, got .+; .+"):
        state.update(*spoil(features, labels))
    assert_same_bits(state, kept)


def test_an_unknown_backend_leaves_every_bit():
    state = new_state(4, 5, "full")
    kept = bits(state)
    with pytest.raises(ValueError, match="^backend: expected"):
        state.update(*random_stream(9, 4, 5), backend="numpy")
    assert_same_bits(state, kept)


@pytest.mark.parametrize("arguments", [(0, 5), (4, -1), (4.0, 5), (True, 5), (4, 5, "lower")])
def test_bad_sizes_are_refused(arguments):
    names = "num_classes|num_features|structure"
    with pytest.raises(ValueError, match=rf"^({names}): expected .+, got .+; .+"):
        iada.ClassCovariance(*arguments)


# As a module ----------------------------------------------------------------------------------


@STRUCTURES
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_half_precision_casts_leave_float32(structure, cast):
    features, labels = random_stream(30, 4, 5)
    state = iada.ClassCovariance(4, 5, structure)
    state.update(features, labels)
    kept = bits(state)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), state)
    getattr(model, cast)()
    assert model[0].weight.dtype == getattr(torch, cast if cast != "half" else "float16")
    assert_same_bits(state, kept)
    assert state.covariance.dtype == torch.float32
    model.to(torch.bfloat16)
    assert_same_bits(state, kept)


def test_to_moves_device_and_dtype():
    state = iada.ClassCovariance(4, 5).to("meta", torch.float16)
    assert {buffer.device.type for buffer in state.buffers()} == {"meta"}
    assert state.double().covariance.dtype == torch.float64
    assert state.count.dtype == torch.int64


@STRUCTURES
def test_state_dict_and_deepcopy(structure):
    features, labels = random_stream(60, 4, 5)
    state = iada.ClassCovariance(4, 5, structure)
    state.update(features[:30], labels[:30])
    loaded = iada.ClassCovariance(4, 5, structure)
    loaded.load_state_dict(state.state_dict())
    copied = copy.deepcopy(state)
    kept = bits(state)
    for other in (loaded, copied):
        assert_same_bits(other, kept)
        other.update(features[30:], labels[30:])
    assert_same_bits(state, kept)
    state.update(features[30:], labels[30:])
    assert_same_bits(loaded, bits(state))
    assert_same_bits(copied, bits(state))


def test_reset_forgets():
    state = iada.ClassCovariance(4, 5)
    state.update(*random_stream(30, 4, 5))
    state.reset()
    assert_same_bits(state, bits(iada.ClassCovariance(4, 5)))


# The path of accelerators ---------------------------------------------------------------------


@pytest.fixture
def masked_path(monkeypatch):
    """The CPU takes the path of accelerators, whose shapes do not depend on the labels."""

    def update(covariance, centred, labels, size, w, shift):
        divisor = size[:-1].clamp(min=1)[:, None].to(centred.dtype)
        torch_ops_covariance._update_full_masked(covariance, centred, labels, divisor, w, shift)

    monkeypatch.setattr(torch_ops_covariance, "_update_full_grouped", update)


@pytest.mark.parametrize("elements", [1, 700, 2**20])
def test_masked_path_equals_population(elements, masked_path, block_elements):
    block_elements(elements)
    features, labels = random_stream(90, 5, 6, ignored=0.2)
    state = new_state(7, 6, "full", dtype=torch.float64)
    for h, y in zip(features.split(11), labels.split(11), strict=True):
        state.update(h, y, backend="torch")
    assert_state(state, population(features, labels, 7, "full"), 1e-13)
    assert (state.covariance[5:] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_masked_path_keeps_the_precision(offset, masked_path):
    features, labels = skewed_stream(rows=20_000, offset=offset)
    state = new_state(10, 16, "full")
    for h, y in zip(features.split(128), labels.split(128), strict=True):
        state.update(h, y, backend="torch")
    assert_state(state, population(features, labels, 10, "full"), 2e-4)


def test_masked_path_keeps_absent_classes(masked_path):
    test_absent_classes_keep_their_bits("full", torch.float32, "torch", torch.device("cpu"))


@pytest.mark.parametrize("structure", ["full", "triangle", "diag", "low-rank"])
def test_masked_path_leaves_out_rows_that_are_not_finite(structure, masked_path, monkeypatch):
    """As `update` asks for rows of float16 on accelerators."""
    monkeypatch.setattr(low_rank_update, "counts_classes", lambda labels: False)
    monkeypatch.setattr(class_covariance, "values_are_checked", lambda device: False)
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)
    features, labels = random_stream(40, 4, 5)
    features = features.half()
    rank = 2 if structure == "low-rank" else None
    state, expected = (iada.ClassCovariance(4, 5, structure, rank) for _ in range(2))
    expected.update(features, labels.where(torch.arange(40) % 10 != 3, -100), backend="torch")
    features[3], features[13, 2] = torch.nan, torch.inf
    features[23], features[33, 0] = -torch.inf, torch.nan
    state.update(features, labels, backend="torch")
    assert_same_bits(state, bits(expected))


@STRUCTURES
def test_autocast_changes_nothing(structure, backend, device):
    assert_same_under_autocast(structure, backend, device)


def test_autocast_changes_nothing_on_the_masked_path(masked_path):
    assert_same_under_autocast("full", "torch", torch.device("cpu"))


def assert_same_under_autocast(structure, backend, device):
    features, labels = random_stream(40, 4, 5)
    features, labels = features.float().to(device), labels.to(device)
    plain, inside = (new_state(4, 5, structure, device) for _ in range(2))
    plain.update(features, labels, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        inside.update(features, labels, backend=backend)
    assert_state(inside, {name: t.cpu() for name, t in bits(plain).items()}, 1e-6)


@STRUCTURES
def test_update_reads_nothing_on_the_host(structure, masked_path):
    features, labels = random_stream(40, 4, 5)
    state = new_state(4, 5, structure, dtype=torch.float64)
    with NoHostReads():
        torch_ops.covariance_update(state.covariance, state.mean, state.count, features, labels)
    assert_state(state, population(features, labels, 4, structure), 1e-13)


@STRUCTURES
def test_update_runs_without_data(structure):
    state = iada.ClassCovariance(4, 5, structure).to("meta")
    features, labels = random_stream(40, 4, 5)
    state.update(features.to("meta"), labels.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_statistics_of_low_precision_are_refused(dtype):
    with pytest.raises(ValueError, match=r"^dtype: expected torch.float32 or torch.float64, got"):
        iada.ClassCovariance(3, 8, dtype=dtype)
    state = iada.ClassCovariance(3, 8)
    low = {
        name: b.to(dtype) if b.is_floating_point() else b for name, b in state.state_dict().items()
    }
    for names in (("covariance",), ("mean",), ("covariance", "mean")):
        state.load_state_dict(iada.ClassCovariance(3, 8).state_dict(), assign=True)
        state.load_state_dict({**state.state_dict(), **{n: low[n] for n in names}}, assign=True)
        with pytest.raises(ValueError, match=rf"^ClassCovariance: expected .+, got {dtype}; "):
            state.update(torch.randn(4, 8), torch.arange(4) % 3)


def test_statistics_are_in_float32_at_least_whatever_the_default():
    before = torch.get_default_dtype()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            made = iada.ClassCovariance(3, 8)
        finally:
            torch.set_default_dtype(before)
        assert made.covariance.dtype is torch.promote_types(torch.float32, default)
