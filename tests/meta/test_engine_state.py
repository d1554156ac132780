"""What an iteration of the Meta-IADA engine may touch, how often, and what a checkpoint holds."""

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import iada
from iada.meta.backbone_passes import BackbonePasses
from iada.meta.feature_jvp import FeatureJVP
from tests.helpers.engine_cases import (
    CLASSES,
    eq_10_by_hand,
    hypergradients,
    make_batches,
    make_engine,
    relative,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = {
    "jvp": {},
    "low memory": {"low_memory": True},
    "head": {"scope": "head"},
    "finite-difference": {"hypergradient": "finite-difference"},
    "finite-difference, low memory": {"hypergradient": "finite-difference", "low_memory": True},
    "double-backward": {"hypergradient": "double-backward"},
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


class Masks(nn.Module):
    """Dropout that remembers its masks by the number of rows."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, inputs):
        mask = torch.bernoulli(torch.full_like(inputs.detach(), 0.7))
        self.seen.setdefault(len(inputs), []).append(mask)
        return inputs * mask


def test_batchnorm_statistics_move_once_by_the_training_batch(mode):
    meta = make_engine("conv", **mode)
    batch, meta_batch = make_batches("conv")
    plain = copy.deepcopy(meta.classifier.backbone)
    plain(batch[0])
    meta.step(batch, meta_batch)
    for name, buffer in meta.classifier.backbone.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name
    assert int(meta.perturbation.norm.num_batches_tracked) == 1


def test_dropout_masks_are_the_same_in_all_passes(mode):
    masks = Masks()
    meta = make_engine("mlp", prepare=lambda backbone, head: backbone.append(masks), **mode)
    meta.step(*make_batches("mlp"))
    first, *others = masks.seen[12]
    passes = {"low_memory": 1, "finite-difference": 2}
    expected = sum(passes.get(word, 0) for option in mode.items() for word in option)
    assert len(others) == expected
    for other in others:
        assert torch.equal(first, other)
    assert len(masks.seen[7]) == 1


def test_random_state_moves_as_by_two_forwards(mode):
    meta = make_engine("mlp", **mode)
    batch, meta_batch = make_batches("mlp")
    torch.manual_seed(3)
    plain = copy.deepcopy(meta.classifier.backbone)
    plain(batch[0])
    plain(meta_batch[0])
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    meta.step(batch, meta_batch)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_low_memory_changes_no_bit(name):
    found = []
    for low_memory in (False, True):
        meta = make_engine(name, low_memory=low_memory, covariance_lr=1e-2)
        torch.manual_seed(7)
        for _ in range(2):
            meta.step(*make_batches(name))
        found.append([*meta.classifier.state_dict().values(), meta.covariance.covariance])
    for normal, low in zip(*found, strict=True):
        assert torch.equal(normal, low)


def test_frozen_parameters_stay_and_get_no_gradient(mode):
    def freeze(backbone, head):
        backbone[0].weight.requires_grad_(False)

    meta = make_engine("conv", prepare=freeze, **mode)
    frozen = meta.classifier.backbone[0].weight
    before = {name: p.detach().clone() for name, p in meta.classifier.named_parameters()}
    meta.step(*make_batches("conv"))
    moved = {n for n, p in meta.classifier.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - {"backbone.0.weight"}
    assert frozen.grad is None


def test_a_frozen_part_keeps_the_hypergradient_exact():
    def freeze(backbone, head):
        backbone[0].weight.requires_grad_(False)
        head.weight.requires_grad_(False)

    found = [
        hypergradients(
            make_engine("conv", prepare=freeze, hypergradient=way), *make_batches("conv")
        )
        for way in ("jvp", "double-backward")
    ]
    assert max(relative(*found).values()) < 1e-8


def test_interval():
    meta = make_engine("mlp", interval=3, covariance_lr=1e-2)
    batch, meta_batch = make_batches("mlp")
    planned, needed, omegas = meta.meta_steps(5), [], []
    for _ in range(5):
        needed.append(meta.needs_meta_batch)
        result = meta.step(batch, meta_batch if meta.needs_meta_batch else None)
        assert torch.isfinite(result.meta_loss)
        omegas.append(torch.cat([p.detach().flatten() for p in meta.perturbation.parameters()]))
    assert needed == [True, False, False, True, False] == planned
    assert meta.meta_steps(2) == [False, True]
    assert torch.equal(omegas[0], omegas[2])
    assert not torch.equal(omegas[2], omegas[3])
    assert int(meta.perturbation.norm.num_batches_tracked) == 5


def test_a_step_between_is_eq_10_alone():
    meta = make_engine("mlp", interval=2, covariance_lr=1e-2)
    batch, meta_batch = make_batches("mlp")
    meta.step(batch, meta_batch)
    trial = copy.deepcopy(meta)
    torch.manual_seed(2)
    result = meta.step(batch)
    torch.manual_seed(2)
    eq_10_by_hand(meta, result, trial.classifier, batch)
    for p, q in zip(trial.classifier.parameters(), meta.classifier.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"scope": "head"}])
@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_autocast(name, options):
    exact = make_engine(name, dtype=torch.float32, hypergradient="double-backward")
    batches = make_batches(name, torch.float32)
    expected = exact.step(*batches)
    meta = make_engine(name, dtype=torch.float32, **options)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        result = meta.step(*batches)
        assert torch.is_autocast_enabled("cpu")
    assert result.loss.dtype == torch.float32
    assert meta._feature_jvp.mode == "graph"
    assert all(p.dtype == torch.float32 for p in meta.classifier.parameters())
    torch.testing.assert_close(result.meta_loss, expected.meta_loss, rtol=0.1, atol=0)


class Scale(nn.Module):
    """A product by numbers, which autocast leaves alone; remembers whether it was on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.linspace(0.5, 1.5, 8)), []

    def forward(self, inputs):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return inputs.repeat(1, 2)[:, :8] * self.weight


def test_autocast_is_the_backbones_alone_and_that_of_its_step():
    def scale(backbone, head):
        del backbone[:]
        backbone.append(Scale())

    batches = make_batches("mlp", torch.float32)
    states, scales = [], []
    for mode in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
        meta = make_engine("mlp", dtype=torch.float32, prepare=scale)
        with mode:
            meta.step(*batches)
        meta.step(*batches)
        states.append(plain_leaves([meta.classifier.state_dict(), meta.state_dict()]))
        scales.append(meta.classifier.backbone[0])
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert scales[0].seen == [True, True, False, False]  # the training and the meta batch's passes


def test_autocast_hypergradient_is_that_of_double_backward_to_rounding():
    found = {}
    for way in ("jvp", "double-backward"):
        meta = make_engine("conv", dtype=torch.float32, hypergradient=way)
        with torch.autocast("cpu", torch.bfloat16):
            found[way] = hypergradients(meta, *make_batches("conv", torch.float32))
    errors = relative(found["jvp"], found["double-backward"])
    assert max(errors.values()) < 0.05, errors  # bfloat16 has eight bits


def test_small_tangents_do_not_underflow_in_float16():
    """ḣ of one layer is its inputs times v; η v is often below float16's smallest number, 6e-8."""
    torch.manual_seed(0)
    backbone, inputs, direction = nn.Linear(6, 8), torch.randn(4, 6), torch.randn(8, 6)
    passes = BackbonePasses(backbone, nn.Linear(8, 3))
    with torch.autocast("cpu", torch.float16), passes.own_autocast():
        random_state = passes.random_state()
        features = passes.forward_and_update_buffers(inputs)
        moved = {backbone.weight: 1e-9 * direction}
        found = FeatureJVP(passes)(features, inputs, random_state, moved)
    assert features.dtype == torch.float16
    # Inputs, v and the result are rounded, each to 2⁻¹¹ of itself.
    bound = 2**-9 * 1e-9 * (inputs.abs() @ direction.abs().T).max()
    assert (found - 1e-9 * inputs @ direction.T).abs().max() < bound


@pytest.mark.parametrize("way", ["jvp", "finite-difference"])
def test_a_frozen_backbone_is_a_virtual_step_of_the_head(way):
    def freeze(backbone, head):
        backbone.requires_grad_(False)

    batches = make_batches("conv")
    found = hypergradients(make_engine("conv", prepare=freeze, hypergradient=way), *batches)
    wanted = hypergradients(make_engine("conv", scope="head"), *batches)
    assert max(relative(found, wanted).values()) < 1e-12


def scaled(**options):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    return make_engine("conv", scaler=scaler, **options), scaler


@pytest.mark.parametrize("low_memory", [False, True])
def test_grad_scaler_changes_nothing_but_the_range(low_memory):
    batches = make_batches("conv")
    meta, scaler = scaled(low_memory=low_memory, clip_norm=0.5)
    plain = make_engine("conv", clip_norm=0.5)
    found = [hypergradients(engine, *batches) for engine in (meta, plain)]
    assert scaler.get_scale() == 2048.0  # grown: nothing overflowed
    assert max(relative(*found).values()) < 1e-10
    for a, b in zip(meta.classifier.parameters(), plain.classifier.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_overflow_skips_all_three_steps():
    meta, scaler = scaled()
    batch, meta_batch = make_batches("conv")
    meta.step(batch, meta_batch)
    before = copy.deepcopy(meta)
    handle = meta.classifier.backbone[3].register_full_backward_hook(
        lambda module, grads, _: tuple(torch.full_like(g, torch.inf) for g in grads)
    )
    meta.step(batch, meta_batch)
    handle.remove()
    assert scaler.get_scale() < before._learner.scaler.get_scale()
    pairs = zip(meta.classifier.parameters(), before.classifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(meta.perturbation.parameters(), before.perturbation.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.isfinite(meta.covariance.covariance).all()


@pytest.mark.parametrize("epsilon", [None, 0.0])
@pytest.mark.parametrize("where", ["virtual step", "meta loss", "meta loss of the head"])
def test_an_overflow_of_the_meta_step_alone_leaves_the_covariance_as_streamed(where, epsilon):
    """With a constant ε too, of which no gradient tells that ḣ or v is not finite."""
    options = {"epsilon": epsilon, "keep_semidefinite": False}
    meta, scaler = scaled(scope="head" if where == "meta loss of the head" else "full", **options)
    batch, meta_batch = make_batches("conv")
    streamed = copy.deepcopy(meta.covariance)
    streamed.update(copy.deepcopy(meta.classifier.backbone)(batch[0]), batch[1])
    if where == "meta loss of the head":
        scaler._init_scale = torch.inf
    passes = []

    def overflow(module, grads, _):
        passes.append(module)
        if len(passes) == (1 if where == "virtual step" else 2):
            return tuple(torch.full_like(g, torch.inf) for g in grads)
        return None

    meta.classifier.backbone[3].register_full_backward_hook(overflow)
    meta.step(batch, meta_batch)
    torch.testing.assert_close(meta.covariance.covariance, streamed.covariance)


def test_a_row_that_overflows_does_not_reach_the_covariance(monkeypatch):
    """As where values are not checked: on an accelerator."""
    for place in ("nn.class_covariance", "nn.iada_loss", "meta.learner", "utils.checks"):
        monkeypatch.setattr(f"iada.{place}.values_are_checked", lambda device: False)
    monkeypatch.setattr("iada_kernels.native.arguments_fit", lambda *arguments: False)
    batch, meta_batch = make_batches("mlp", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    meta = make_engine("mlp", scaler=scaler, dtype=torch.float32)
    meta.step(batch, meta_batch)
    spoiled = (torch.cat([batch[0][:1] * torch.inf, batch[0][1:]]), *batch[1:])
    with contextlib.suppress(FloatingPointError, ValueError):
        meta.step(spoiled, meta_batch)
    assert torch.isfinite(meta.covariance.covariance).all()
    assert torch.isfinite(meta.covariance.mean).all()
    halves = iada.ClassCovariance(2, 3)
    features = torch.tensor([[1.0, 2, 3], [torch.inf, 0, 0], [4, 5, 6]], dtype=torch.float16)
    halves.update(features, torch.tensor([0, 0, 1]), backend="torch")
    assert halves.count.tolist() == [1, 1]
    assert torch.isfinite(halves.covariance).all()
    criterion = iada.IADALoss(2, 3, backend="torch")
    loss = criterion(features, torch.randn(2, 3).half(), None, torch.tensor([0, 0, 1]))
    assert not torch.isfinite(loss)
    for kept, same in zip(criterion.covariance.buffers(), halves.buffers(), strict=True):
        assert torch.equal(kept, same)


@pytest.mark.parametrize("disabled", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_a_disabled_scaler_is_none(disabled):
    meta, plain = make_engine("mlp", scaler=disabled), make_engine("mlp")
    for engine in (meta, plain):
        torch.manual_seed(0)
        engine.step(*make_batches("mlp"))
    for a, b in zip(meta.classifier.parameters(), plain.classifier.parameters(), strict=True):
        assert torch.equal(a, b)


def test_double_backward_is_refused_with_what_it_does_without():
    with pytest.raises(ValueError, match="^hypergradient: expected 'jvp' .* scaler, got 'double-b"):
        scaled(hypergradient="double-backward")
    with pytest.raises(ValueError, match="^hypergradient: expected .* with low_memory"):
        make_engine("mlp", low_memory=True, hypergradient="double-backward")
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    make_engine("mlp", scaler=disabled, hypergradient="double-backward")


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"interval": 2}])
def test_state_dict_resumes_bit_for_bit(options):
    batches = make_batches("transformer")
    options = {"covariance_lr": 1e-2} | options
    one, other = make_engine("transformer", **options), make_engine("transformer", **options)
    torch.manual_seed(11)
    one.step(*batches)
    state = copy.deepcopy(
        [one.classifier.state_dict(), one.optimizer.state_dict(), one.state_dict()]
    )
    random_state = torch.get_rng_state()
    parts = (other.classifier, other.optimizer, other)
    for part, saved in zip(parts, state, strict=True):
        part.load_state_dict(saved)
    ends = []
    for meta in (one, other):
        torch.set_rng_state(random_state)
        seen = [meta.step(*batches).meta_loss.clone() for _ in range(3)]
        ends.append([meta.classifier.state_dict(), meta.state_dict(), seen])
    torch.testing.assert_close(*map(plain_leaves, ends), rtol=0, atol=0)


def plain_leaves(state):
    """The tensors and numbers of nested states, in order."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, int | float | torch.Tensor)]


class Skipped(nn.Module):
    """A layer that Python's or numpy's generator leaves out half of the time."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.layer = draw, nn.Linear(6, 6)

    def forward(self, inputs):
        return self.layer(inputs) if self.draw() < 0.5 else inputs


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_passes_that_repeat_draw_the_same_from_every_generator(draw):
    batch, meta_batch = make_batches("mlp")
    ends, draws = [], []
    for low_memory in (False, True):
        torch.manual_seed(0)
        backbone = nn.Sequential(*(Skipped(draw) for _ in range(6)), nn.Linear(6, 8)).double()
        head = nn.Linear(8, CLASSES).double()
        optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
        meta = iada.MetaIADA(backbone, head, optimizer, torch.ones(CLASSES), low_memory=low_memory)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - what backbones draw from
        meta.step(batch, meta_batch)
        ends.append([*backbone.parameters(), *meta.perturbation.parameters()])
        draws.append(draw())
    assert draws[0] == draws[1]  # and the generator goes on from the same place
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_distributed_module_is_refused():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(ValueError, match="^backbone: expected a plain module"):
        iada.MetaIADA(Wrapped(), nn.Linear(8, 3), None, torch.ones(3))
    for backbone, place in (
        (nn.Sequential(nn.Sequential(nn.Linear(6, 8), Wrapped()), nn.ReLU()), "backbone.0.1"),
        (torch.compile(Wrapped()), "backbone._orig_mod"),
    ):
        got = f"got DistributedDataParallel as {place}; put its .module in its place"
        with pytest.raises(ValueError, match=f"^backbone: expected a plain module, {got}"):
            iada.MetaIADA(backbone, nn.Linear(8, 3), None, torch.ones(3))


def test_other_wrappers_are_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Sharded(FullyShardedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    head, counts = nn.Linear(8, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"got DataParallel; pass backbone\.module: gradients are"):
        iada.MetaIADA(nn.DataParallel(nn.Linear(6, 8)), head, None, counts)
    with pytest.raises(ValueError, match="got FullyShardedDataParallel; leave it out"):
        iada.MetaIADA(Sharded(), head, None, counts)
