"""The hypergradients of Meta-Weight-Net and MetaSAug against double backward, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import iada
from iada.meta.options import MetaStepOptions
from iada.methods.meta_weight_net import MetaWeightNet, MetaWeightNetOptions, WeightNet
from iada.methods.options import MethodRun
from iada.nn.priors import class_balanced_weights
from tests.helpers.engine_cases import (
    BACKBONES,
    CLASSES,
    hypergradients,
    make_batches,
    make_engine,
    relative,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = torch.tensor([0.3, 0.9, 1.8], dtype=torch.float64)


def make_weight_net(name, form=None, **options):
    torch.manual_seed(0)
    build, _, width = BACKBONES[name]
    backbone, head = build().double(), nn.Linear(width, CLASSES).double()
    groups = [
        {"params": list(backbone.parameters()), "lr": 0.5},
        {"params": list(head.parameters()), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)
    weight_net = WeightNet().double()
    run = MethodRun(backbone, head, optimizer, torch.ones(CLASSES))
    adam = torch.optim.Adam(weight_net.parameters(), 1e-3)
    return MetaWeightNet(run, MetaStepOptions(**options), weight_net, adam, **(form or {}))


def after_virtual_step(backbone, head, batch, loss, rates, moves=lambda name: True):
    """Backbone and head moved down the gradient of loss(features, weight, bias), with its graph."""
    names = {f"b.{n}": p for n, p in backbone.named_parameters()}
    names |= {f"h.{n}": p for n, p in head.named_parameters()}
    buffers = {n: b.clone() for n, b in backbone.named_buffers()}
    features = functional_call(
        backbone, {n[2:]: p for n, p in names.items() if n[0] == "b"} | buffers, (batch[0],)
    )
    value = loss(features)
    moving = {n: p for n, p in names.items() if n[0] == "h" or moves(n)}
    grads = torch.autograd.grad(value, list(moving.values()), create_graph=True)
    moved = {n: p - rates[n[0]] * g for (n, p), g in zip(moving.items(), grads, strict=True)}
    return {**names, **moved}


# The backbones' last two blocks, by the names of their parameters; resnet's are residual blocks.
LAST_BLOCKS = {
    "mlp": ("b.3.", "b.0."),
    "conv": ("b.4.", "b.1."),
    "resnet": ("b.5.", "b.4."),
    "transformer": ("b.feed.3.", "b.feed.0."),
}


def moved_by(name, scope):
    """Whether the virtual step moves a parameter of the backbone, by its name."""
    if isinstance(scope, str):
        return lambda parameter: scope == "full"
    return lambda parameter: parameter.startswith(LAST_BLOCKS[name][:scope])


def meta_loss(backbone, moved, meta_batch):
    buffers = {n: b.clone() for n, b in backbone.named_buffers()}
    own = {n[2:]: p for n, p in moved.items() if n[0] == "b"}
    features = functional_call(backbone, own | buffers, (meta_batch[0],))
    return F.cross_entropy(F.linear(features, moved["h.weight"], moved["h.bias"]), meta_batch[1])


IMBALANCE = {"normalized": True, "through_loss": True}
FORMS = [{}, {"normalized": True}, {"through_loss": True}, IMBALANCE]


def weighted_loss(net, losses, normalized=False, through_loss=False):
    """Of each form of the published codes, from one of its samples after the other."""
    weights = [net(loss[None] if through_loss else loss[None].detach())[0] for loss in losses]
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return total / (sum(weights) if normalized else len(losses))


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "transformer"])
@pytest.mark.parametrize(
    "options",
    [
        *({"form": form} for form in FORMS),
        {"scope": 1},
        {"scope": 2},
        {"scope": "head"},
        {"low_memory": True},
        {"scope": "head", "form": IMBALANCE},
        {"low_memory": True, "form": IMBALANCE},
    ],
    ids=str,
)
def test_meta_weight_net_equals_double_backward(name, options):
    method = make_weight_net(name, **options)
    batch, meta_batch = make_batches(name)
    backbone, head = copy.deepcopy((method._learner.classifier.backbone, method.head))
    net = copy.deepcopy(method.weight_net)

    def weighted(features):
        losses = F.cross_entropy(head(features), batch[1], reduction="none")
        return weighted_loss(net, losses, **options.get("form", {}))

    torch.manual_seed(5)
    rates = {"b": 0.5, "h": 0.2}
    moves = moved_by(name, options.get("scope", "full"))
    moved = after_virtual_step(backbone, head, batch, weighted, rates, moves)
    value = meta_loss(backbone, moved, meta_batch)
    value.backward()

    torch.manual_seed(5)
    result = method.step(batch, meta_batch)
    torch.testing.assert_close(result.meta_loss, value.detach())
    for have, want in zip(method.weight_net.parameters(), net.parameters(), strict=True):
        error = (have.grad - want.grad).abs().max() / want.grad.abs().max()
        assert error < 1e-8


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_meta_weight_net_steps_by_the_new_weights(form):
    """These are constants in either form."""
    method = make_weight_net("conv", form)
    batch, meta_batch = make_batches("conv")
    backbone, head = copy.deepcopy((method._learner.classifier.backbone, method.head))
    result = method.step(batch, meta_batch)
    losses = F.cross_entropy(head(backbone(batch[0])), batch[1], reduction="none")
    weights = method.weight_net(losses.detach()).detach()
    loss = (weights * losses).sum() / (weights.sum() if form.get("normalized") else len(losses))
    torch.testing.assert_close(result.loss, loss.detach())
    loss.backward()
    # Momentum's first step is the gradient itself.
    want = head.weight - 0.2 * (head.weight.grad + 1e-3 * head.weight)
    torch.testing.assert_close(method.head.weight, want)
    first = next(backbone.parameters())
    want = first - 0.5 * (first.grad + 1e-3 * first)
    torch.testing.assert_close(next(method._learner.classifier.backbone.parameters()), want)
    for have, other in zip(
        method._learner.classifier.backbone.buffers(), backbone.buffers(), strict=True
    ):
        torch.testing.assert_close(have, other)


def test_meta_weight_net_s_options_for_class_imbalance():
    """Θ moves by torch's own SGD on its gradient; the default is Adam, as for wrong labels."""
    settings = {"perturbation_optimizer": "SGD", "perturbation_lr": 1e-5, **IMBALANCE}
    options = MetaWeightNetOptions(**settings, perturbation_weight_decay=5e-4)
    torch.manual_seed(0)
    backbone, head = BACKBONES["mlp"][0]().double(), nn.Linear(8, CLASSES).double()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    run = MethodRun(backbone, head, optimizer, torch.ones(CLASSES))
    method = options.build(run)
    assert (method.normalized, method.through_loss) == (True, True)
    twin = copy.deepcopy(method.weight_net)
    sgd = torch.optim.SGD(twin.parameters(), 1e-5, 0.9, weight_decay=5e-4, nesterov=True)
    for _ in range(3):
        method.step(*make_batches("mlp"))
        for have, want in zip(method.weight_net.parameters(), twin.parameters(), strict=True):
            assert have.grad.abs().max() > 0
            want.grad = have.grad.clone()
        sgd.step()
    for have, want in zip(method.weight_net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(have, want)
    default = MetaWeightNetOptions().build(run)
    (group,) = default.weight_optimizer.param_groups
    assert isinstance(default.weight_optimizer, torch.optim.Adam)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)


def test_weights_that_round_to_nothing_keep_their_ratios():
    method = make_weight_net("mlp", IMBALANCE)
    method.weight_net.weight.bias.data.fill_(-1e4)
    batch, meta_batch = make_batches("mlp")
    losses = torch.arange(5, dtype=torch.float64)
    assert not method.weight_net(losses).any()
    scores = method.weight_net.scores(losses)
    torch.testing.assert_close(method._weights(losses), 5 * scores.softmax(dim=0))
    method.step(batch, meta_batch)
    assert all(torch.isfinite(p).all() for p in method.weight_net.parameters())


def test_meta_weight_net_has_no_double_backward():
    with pytest.raises(ValueError, match="hypergradient: expected 'jvp' or 'finite-difference'"):
        make_weight_net("mlp", hypergradient="double-backward")


def metasaug_loss(features, head, labels, sigma, alpha, weights):
    """F.cross_entropy with weights of z + α ½ (w_j − w_y)ᵀ Σ_y (w_j − w_y), sample by sample."""
    total = norm = 0.0
    for h, y in zip(features, labels, strict=True):
        rows = head.weight - head.weight[y]
        square = rows @ sigma[y] @ rows.T if sigma.dim() == 3 else rows * sigma[y] @ rows.T
        z = head(h) + alpha / 2 * square.diagonal()
        total = total - weights[y] * z.log_softmax(dim=0)[y]
        norm = norm + weights[y]
    return total / norm


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("scope", ["full", "head"])
def test_metasaug_equals_double_backward(name, structure, scope):
    options = {"epsilon": 0.0, "beta": 0.0, "class_weights": WEIGHTS, "scope": scope}
    method = make_engine(name, structure, **options)
    batch, meta_batch = make_batches(name)
    backbone, head = copy.deepcopy((method._learner.classifier.backbone, method.head))
    torch.manual_seed(5)
    with torch.no_grad():
        features = copy.deepcopy(backbone)(batch[0])
    streamed = copy.deepcopy(method.covariance)
    streamed.update(features, batch[1])
    sigma = streamed.covariance.clone().requires_grad_()

    def loss(features):
        return metasaug_loss(features, head, batch[1], sigma, 0.5, WEIGHTS)

    torch.manual_seed(5)
    rates = {"b": 0.05, "h": 0.2}
    moved = after_virtual_step(backbone, head, batch, loss, rates, moved_by(name, scope))
    (want,) = torch.autograd.grad(meta_loss(backbone, moved, meta_batch), sigma)
    if structure == "full":
        want = (want + want.mT) / 2

    torch.manual_seed(5)
    result = method.step(batch, meta_batch)
    assert result.epsilon is None
    have = (streamed.covariance - method.covariance.covariance) / method.covariance_lr
    assert (have - want).abs().max() / want.abs().max() < 1e-8


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize(
    "options", [{"class_weights": WEIGHTS}, {"class_weights": WEIGHTS, "epsilon": 0.3}], ids=str
)
def test_weights_and_constant_strengths_in_the_engine(structure, options):
    found = []
    for way in ("jvp", "double-backward"):
        method = make_engine("conv", structure, hypergradient=way, **options)
        found.append(hypergradients(method, *make_batches("conv")))
    errors = relative(*found)
    assert max(errors.values()) < 1e-8, errors


def test_metasaug_uses_its_meta_step_once():
    """Eq. 10 takes the Σ moved by Eq. 9; what is kept is the streamed one."""
    torch.manual_seed(0)
    (batch, meta_batch), (build, _, width) = make_batches("conv"), BACKBONES["conv"]
    backbone, head = build().double(), nn.Linear(width, CLASSES).double()
    data = iada.TensorData(*batch)
    settings = {"method": "metasaug", "epochs": 1, "ce_epochs": 0, "covariance_lr": 50.0}
    config = iada.TrainerConfig.from_settings({**settings, "keep_semidefinite": False})
    counts = torch.tensor([40, 20, 10])
    trainer = iada.Trainer(backbone, head, data, data, config, class_counts=counts)
    method, weights = trainer.method, class_balanced_weights(counts, 0.9999)
    before, before_head = copy.deepcopy((backbone, head))
    result = method.step(batch, meta_batch)
    features = before(batch[0])
    streamed = iada.ClassCovariance(CLASSES, width).double()
    streamed.update(features, batch[1])
    assert torch.equal(method.covariance.covariance, streamed.covariance)
    plain = metasaug_loss(features, before_head, batch[1], streamed.covariance, 0.5, weights)
    assert abs(result.loss - plain.detach()) > 1e-6
    assert float(result.loss) == pytest.approx(float(plain.detach()), rel=0.2)


def test_equation_5_weighs_each_class_by_its_inverse_share():
    (batch, _), (build, _, width) = make_batches("conv"), BACKBONES["conv"]
    backbone, head = build().double(), nn.Linear(width, CLASSES).double()
    settings = {"method": "meta-iada", "beta": 0.0, "inverse_weights": True, "covariance_lr": 0.0}
    settings |= {"perturbation": "constant", "alpha": 0.0, "epochs": 1, "ce_epochs": 0}
    counts, data = torch.tensor([40, 20, 10]), iada.TensorData(*batch)
    config = iada.TrainerConfig.from_settings(settings)
    method = iada.Trainer(backbone, head, data, None, config, class_counts=counts).method
    losses = F.cross_entropy(head(backbone(batch[0])), batch[1], reduction="none").detach()
    weights = (counts.sum() / counts)[batch[1]]
    loss = method.step(batch, None).loss
    torch.testing.assert_close(loss, (weights * losses).sum() / weights.sum(), rtol=1e-6, atol=0)


def test_equation_5_has_no_prior():
    with pytest.raises(ValueError, match=r"beta: expected 0 with inverse_weights, got 1\.0"):
        iada.TrainerConfig.from_settings({"method": "meta-iada", "inverse_weights": True})


@pytest.mark.parametrize("epsilon", [0.0, -0.4])
def test_constant_strengths(epsilon):
    method = make_engine("conv", epsilon=epsilon)
    batch, meta_batch = make_batches("conv")
    result = method.step(batch, meta_batch)
    if epsilon:
        assert torch.equal(result.epsilon, torch.full((12,), epsilon, dtype=torch.float64))
    else:
        assert result.epsilon is None
    assert method.perturbation is None
    assert "perturbation" not in method.state_dict()
    other = make_engine("conv", epsilon=epsilon)
    other.load_state_dict(method.state_dict())


def test_the_gradient_of_a_step_is_that_step_s():
    one, batches = make_weight_net("mlp"), make_batches("mlp")
    torch.manual_seed(1)
    one.step(*batches)
    other = copy.deepcopy(one)
    other.weight_optimizer.zero_grad()
    for method in (one, other):
        torch.manual_seed(2)
        method.step(*batches)
    for a, b in zip(one.weight_net.parameters(), other.weight_net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a, b)
