"""Backbones without a forward-mode derivative somewhere: another way, and one line in the log."""

import functools
import logging

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from iada.meta import graph_jvp as tangent
from tests.helpers.engine_cases import hypergradients, make_batches, make_engine, relative

pytestmark = pytest.mark.usefixtures("one_thread")


class Bags(nn.Module):
    """Reads the inputs' signs as words; by a product, which autograd differentiates twice, too."""

    def __init__(self, plain=False):
        super().__init__()
        self.words = nn.EmbeddingBag(2, 8)
        self.out = nn.Linear(8, 8)
        self.plain = plain

    def forward(self, inputs):
        words = (inputs > 0).long()
        if self.plain:
            share = nn.functional.one_hot(words, 2).to(inputs.dtype).mean(dim=1)
            return self.out(share @ self.words.weight).tanh()
        return self.out(self.words(words)).tanh()


class Scaled(torch.autograd.Function):
    """Its backward is not that of its forward: the backward counts."""

    @staticmethod
    def forward(ctx, factor, inputs):
        ctx.factor = factor
        return factor * inputs.round(decimals=1)

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.factor * grad


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor, inputs):
        ctx.factor = factor
        return factor * inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, ctx.factor * grad


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function.apply(2.0, inputs) if self.function else 2.0 * inputs


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))
        self.reentrant = reentrant

    def forward(self, inputs):
        if self.reentrant is None:
            return self.inner(inputs)
        return checkpoint(self.inner, inputs, use_reentrant=self.reentrant)


def engine_with(layer, **options):
    def prepare(backbone, head):
        if isinstance(layer(), Bags):
            del backbone[:]
        torch.manual_seed(4)
        backbone.append(layer().double())

    return make_engine(prepare=prepare, **options)


def by_oracle(layer):
    meta = engine_with(layer, hypergradient="double-backward")
    return hypergradients(meta, *make_batches("mlp"))


@pytest.mark.parametrize(
    ("layer", "plain", "place"),
    [
        (Bags, lambda: Bags(plain=True), "'0.words' (EmbeddingBag)"),
        (lambda: Custom(Once), lambda: Custom(None), "'5' (Custom)"),
        (lambda: Checkpointed(True), Checkpointed, "'5' (Checkpointed)"),
    ],
)
@pytest.mark.parametrize("low_memory", [False, True])
def test_fallback_logs_one_line_that_names_the_layer(layer, plain, place, low_memory, caplog):
    batches = make_batches("mlp")
    with caplog.at_level(logging.WARNING, "iada"):
        meta = engine_with(layer, low_memory=low_memory)
        found = hypergradients(meta, *batches)
        meta.step(*batches)
    assert [record.name for record in caplog.records] == ["iada"]
    assert f"layer {place}" in caplog.text
    assert not any(module._forward_hooks for module in meta.classifier.modules())
    errors = relative(found, by_oracle(plain))
    assert max(errors.values()) < 1e-3, errors


def test_a_reentrant_checkpoint_adds_nothing_to_the_gradients_of_a_step_before():
    ends = []
    for reentrant in (True, None):
        layer = functools.partial(Checkpointed, reentrant)
        meta = engine_with(layer, epsilon=0.0, covariance_lr=0.0)
        torch.manual_seed(3)
        for _ in range(2):
            meta.step(make_batches("mlp")[0])
        ends.append(list(meta.classifier.parameters()))
    torch.testing.assert_close(*ends)


def test_a_reentrant_checkpoint_leaves_other_gradients_alone():
    """Only backward() goes through it, which writes those of all parameters behind."""
    meta = engine_with(lambda: Checkpointed(True))
    other = meta.classifier.backbone[5].inner[0].bias
    group = meta.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not other]
    meta.step(*make_batches("mlp"))
    assert other.grad is None


def test_a_resumed_run_is_not_told_again(caplog):
    batches = make_batches("mlp")
    meta, resumed = (engine_with(lambda: Custom(Once)) for _ in range(2))
    meta.step(*batches)
    resumed.load_state_dict(meta.state_dict())
    with caplog.at_level(logging.WARNING, "iada"):
        caplog.clear()
        resumed.step(*batches)
    assert not caplog.records


@pytest.mark.parametrize("low_memory", [False, True])
def test_checkpointed_layers_stay_exact(low_memory, caplog):
    """They run their forward again in each backward, in the meta pass at φ̄."""
    with caplog.at_level(logging.WARNING, "iada"):
        meta = engine_with(lambda: Checkpointed(False), low_memory=low_memory)
        found = hypergradients(meta, *make_batches("mlp"))
    assert not caplog.records
    errors = relative(found, by_oracle(Checkpointed))
    assert max(errors.values()) < 1e-8, errors


def test_a_function_of_ones_own_is_exact(caplog):
    with caplog.at_level(logging.WARNING, "iada"):
        meta = engine_with(lambda: Custom(Scaled))
        found = hypergradients(meta, *make_batches("mlp"))
    assert not caplog.records
    errors = relative(found, by_oracle(lambda: Custom(Scaled)))
    assert max(errors.values()) < 1e-8, errors


def test_attention_dropout_in_a_fused_kernel(monkeypatch):
    """Differences for one step, with its masks; from the next on the formula, which is exact."""
    name = "ScaledDotProductFlashAttentionForCpuBackward0"

    def drops(node, given):
        raise RuntimeError("its dropout mask is inside a fused kernel")

    monkeypatch.setitem(tangent.RULES, name, drops)
    batches = make_batches("fused-attention")
    meta, oracle = (
        make_engine("fused-attention", hypergradient=way) for way in ("jvp", "double-backward")
    )
    first = relative(hypergradients(meta, *batches), hypergradients(oracle, *batches))
    assert 1e-12 < max(first.values()) < 1e-4
    assert meta._feature_jvp.mode == "graph"
    meta, state = make_engine("fused-attention", covariance_lr=1e6), meta.state_dict()
    meta.set_extra_state(state["_extra_state"])
    oracle = make_engine("fused-attention", hypergradient="double-backward")
    second = relative(hypergradients(meta, *batches), hypergradients(oracle, *batches))
    assert max(second.values()) < 1e-12
