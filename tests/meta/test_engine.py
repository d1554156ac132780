"""The Meta-IADA engine: exact hypergradients by every way, at every precision."""

import copy

import pytest
import torch
from torch import nn

import iada
from iada.meta.scope import moved_parameters
from tests.helpers.engine_cases import (
    BACKBONES,
    TransformerBlock,
    hypergradients,
    make_batches,
    make_engine,
    relative,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def by_both(name, structure="full", **options):
    """Hypergradients by the default way, and by double backward."""
    batches = make_batches(name)
    engines = [
        make_engine(name, structure, hypergradient=way, **options)
        for way in ("jvp", "double-backward")
    ]
    found = [hypergradients(engine, *batches) for engine in engines]
    assert engines[0]._feature_jvp.mode == "graph"  # differences may be as near
    return found


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("scope", ["full", 1, "head"])
def test_jvp_equals_double_backward(name, structure, scope):
    errors = relative(*by_both(name, structure, scope=scope))
    assert max(errors.values()) < 1e-8, errors


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "transformer"])
def test_finite_differences_are_near(name):
    meta = make_engine(name, hypergradient="finite-difference")
    found = hypergradients(meta, *make_batches(name))
    oracle = make_engine(name, hypergradient="double-backward")
    errors = relative(found, hypergradients(oracle, *make_batches(name)))
    assert max(errors.values()) < 2e-3, errors


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "transformer", "fused-attention"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_single_precision_is_as_good_as_torch(name, structure):
    def without_dropout(backbone, head):  # draws differ between the dtypes
        for module in backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0

    def found(dtype, hypergradient):
        options = {"prepare": without_dropout, "hypergradient": hypergradient}
        meta = make_engine(name, structure, dtype, **options)
        return hypergradients(meta, *make_batches(name, dtype))

    exact = found(torch.float64, "double-backward")
    own = relative(found(torch.float32, "double-backward"), exact)
    errors = relative(found(torch.float32, "jvp"), exact)
    for part, error in errors.items():
        assert error <= max(4 * own[part], 2**-20), f"{part}: {error:.2e}, torch {own[part]:.2e}"


@pytest.mark.parametrize("settings", [{"dampening": 0.1}, {"nesterov": True}])
def test_virtual_step_with_momentum_and_decay(settings):
    options = {"virtual_momentum": True, "virtual_weight_decay": True}
    batches = make_batches("conv")
    found = []
    for hypergradient in ("jvp", "double-backward"):
        meta = make_engine("conv", hypergradient=hypergradient, covariance_lr=1e-3, **options)
        for group in meta.optimizer.param_groups:
            group.update(settings)
        meta.step(*batches)  # fills the momentum buffers
        meta.covariance_lr = 1e6
        found.append(hypergradients(meta, *batches))
    errors = relative(*found)
    assert max(errors.values()) < 1e-8, errors


@pytest.mark.parametrize("settings", [{"dampening": 0.1}, {"nesterov": True}, {}])
def test_virtual_momentum_is_that_of_sgd(settings):
    meta = make_engine("mlp", virtual_momentum=True, virtual_weight_decay=True, covariance_lr=0.0)
    for group in meta.optimizer.param_groups:
        group.update(settings)
    for _ in range(2):  # without buffers, and with
        gradients = {p: torch.randn_like(p) for p in meta.classifier.parameters()}
        taken = meta.options.virtual.take(meta.optimizer, gradients)
        for p, grad in gradients.items():
            p.grad = grad
        meta.optimizer.step()
        for p, (value, _) in taken.items():
            torch.testing.assert_close(value, p.detach())


def test_virtual_momentum_needs_sgd():
    backbone, head = nn.Identity(), nn.Linear(5, 3)
    adam = torch.optim.Adam(head.parameters())
    with pytest.raises(ValueError, match="^virtual_momentum: expected torch.optim.SGD"):
        iada.MetaIADA(backbone, head, adam, torch.ones(3), virtual_momentum=True)


@pytest.mark.parametrize(
    "options",
    [
        {"hypergradient": "exact"},
        {"scope": "tail"},
        {"interval": 0},
        {"hypergradient": "double-backward", "low_memory": True},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        make_engine(**options)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer(optimizer):
    found = []
    for hypergradient in ("jvp", "double-backward"):
        meta = make_engine("conv", hypergradient=hypergradient)
        meta._learner.optimizer = optimizer(meta.classifier.parameters(), lr=0.01)
        found.append(hypergradients(meta, *make_batches("conv")))
    assert max(relative(*found).values()) < 1e-8


def test_a_dependence_on_nothing_that_moves():
    """A frozen backbone: the virtual step moves the head alone, by either scope."""

    def freeze(backbone, head):
        backbone.requires_grad_(False)

    full, head = (
        hypergradients(make_engine("conv", prepare=freeze, scope=s), *make_batches("conv"))
        for s in ("full", "head")
    )
    errors = relative(full, head)
    assert max(errors.values()) < 1e-12, errors


def test_tied_head():
    """A weight that is the head's and the backbone's moves in both places."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, inputs):
            hidden = self.first(inputs).tanh()
            return hidden + self.out(hidden).tanh() @ self.out.weight

    found = []
    for hypergradient in ("jvp", "double-backward"):
        torch.manual_seed(0)
        backbone = Tied().double()
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.2)
        covariance = iada.ClassCovariance(3, 8).double()
        meta = iada.MetaIADA(
            backbone,
            backbone.out,
            optimizer,
            torch.ones(3),
            covariance=covariance,
            covariance_lr=1e6,
            hypergradient=hypergradient,
            keep_semidefinite=False,
        )
        found.append(hypergradients(meta, *make_batches("mlp")))
    assert max(relative(*found).values()) < 1e-8


class Round(nn.Module):
    def forward(self, inputs):
        return inputs.round() + inputs.sign() * inputs


class Factors(nn.Module):
    """Sums and products with alpha and beta."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))

    def forward(self, inputs):
        both = torch.add(inputs, inputs.sin(), alpha=0.3)
        second = torch.add(torch.ones_like(inputs), inputs, alpha=0.7)
        return torch.addmm(both + second, inputs, self.weight, beta=0.5, alpha=0.2)


class FrozenFilter(nn.Module):
    """A convolution of which input and bias move, and the weight does not."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv1d(1, 1, 3, padding=1)
        self.filter.weight.requires_grad_(False)

    def forward(self, inputs):
        return self.filter(inputs[:, None])[:, 0]


class Attention(nn.Module):
    """Four tokens of width 2."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, inputs):
        tokens = inputs.unflatten(1, (1, 4, 2))
        parts = (tokens, tokens.sin(), tokens.cos())
        return nn.functional.scaled_dot_product_attention(*parts, **self.settings).flatten(1)


MASK = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)

ACTIVATIONS = [
    nn.ELU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.Hardtanh(),
    nn.LeakyReLU(),
    nn.Mish(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.Softmax(dim=1),
    nn.LogSoftmax(dim=1),
    nn.Softplus(),
    nn.Softmin(dim=1),
    nn.PReLU(),
    nn.GLU(),
    Round(),
    nn.ReLU6(),
    nn.GroupNorm(2, 8),
    nn.LayerNorm(8, elementwise_affine=False),
    nn.LayerNorm(8, bias=False),
    nn.RMSNorm(8),
    nn.BatchNorm1d(8),
    nn.BatchNorm1d(8).eval(),
    nn.Bilinear(8, 8, 8),
    nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    Factors(),
    FrozenFilter(),
    Attention(is_causal=True),
    Attention(scale=0.3),
    Attention(attn_mask=MASK),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=lambda layer: type(layer).__name__)
def test_other_layers(layer):
    """Whatever has a rule of its own, and whatever goes by its own backward function."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, inputs):
            hidden = 3 * inputs + 0.1
            args = (hidden, hidden.cos()) if isinstance(self.layer, nn.Bilinear) else (hidden,)
            found = self.layer(*args)
            return torch.cat([found, hidden[:, found.shape[1] :]], dim=1)

    def prepare(backbone, head):
        del backbone[3:]
        backbone.append(nn.Linear(16, 8).double())
        backbone.append(Between().double())
        backbone.append(nn.Linear(8, 8).double())

    errors = relative(*by_both("mlp", "full", prepare=prepare))
    assert max(errors.values()) < 1e-8, errors


def test_features_that_are_not_the_first_output_of_their_operator():
    class Second(nn.Module):
        def forward(self, inputs):
            return torch.cat([inputs.exp(), inputs], dim=1).chunk(2, dim=1)[1]

    errors = relative(*by_both("mlp", prepare=lambda backbone, _: backbone.append(Second())))
    assert max(errors.values()) < 1e-8, errors


def test_more_blocks_than_the_backbone_has_are_refused():
    with pytest.raises(ValueError, match="^scope: expected at most 2, the blocks of the backbone"):
        make_engine("mlp", scope=3)
    backbone = nn.Sequential(nn.Sequential(TransformerBlock()))  # around the network
    moved = moved_parameters(backbone, nn.Linear(8, 3), list(backbone.parameters()), 1)
    assert {id(p) for p in moved} == {id(p) for p in backbone[0][0].feed[3].parameters()}
