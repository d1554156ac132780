"""Units of ε, gradients free of the rate, and iterations that learn nothing and so cost no more."""

import copy

import pytest
import torch

import iada
from iada.meta.epsilon import EpsilonScale
from tests.helpers.engine_cases import hypergradients, make_batches, make_engine, relative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_scale": 0.3},
        {"epsilon_unit": "class-deviation"},
        {"epsilon_unit": "class-deviation", "epsilon_scale": 2.0, "scope": "head"},
        {"rate_free_perturbation": True},
        {"log_proportion": True},
    ],
    ids=str,
)
def test_hypergradients_equal_double_backward(structure, options):
    found = [
        hypergradients(
            make_engine("conv", structure, hypergradient=way, **options), *make_batches("conv")
        )
        for way in ("jvp", "double-backward")
    ]
    errors = relative(*found)
    assert max(errors.values()) < 1e-8, errors


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_class_deviation(structure):
    covariance = iada.ClassCovariance(3, 4, structure).double()
    features = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    covariance.update(features, labels)
    scale = EpsilonScale(0.5, "class-deviation").at(covariance, labels[:4])
    radius = [features[labels == c].var(dim=0, correction=0).sum().sqrt() for c in (0, 1, 2, 0)]
    torch.testing.assert_close(scale, 0.5 * torch.stack(radius) / 2)
    covariance.covariance.neg_()  # as Eq. 9 may leave it, taken literally
    assert not EpsilonScale(0.5, "class-deviation").at(covariance, labels).any()


def test_epsilon_is_scaled_in_the_loss_and_for_the_caller():
    batches = make_batches("conv")
    plain, scaled = make_engine("conv"), make_engine("conv", epsilon_scale=0.25)
    for engine in (plain, scaled):
        engine.covariance_lr = 0.0
        engine.perturbation.requires_grad_(False)
    results = [engine.step(batches[0]) for engine in (plain, scaled)]
    torch.testing.assert_close(results[1].epsilon, 0.25 * results[0].epsilon)
    assert abs(results[1].loss - results[0].loss) > 1e-4
    constant = make_engine("conv", epsilon=0.4, epsilon_scale=0.5, covariance_lr=0.0)
    torch.testing.assert_close(constant.step(batches[0]).epsilon, torch.full((12,), 0.2).double())


def test_zero_initialised_network_starts_as_no_perturbation():
    batches, network = make_batches("conv"), iada.PerturbationNet(zero_init=True).double()
    engines = [
        make_engine("conv", covariance_lr=0.0, **options)
        for options in ({"perturbation": network.requires_grad_(False)}, {"epsilon": 0.0})
    ]
    results = [engine.step(*batches) for engine in engines]
    assert not results[0].epsilon.any()
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-12, atol=0)
    learning = make_engine("conv", perturbation=network.requires_grad_())
    learning.step(*batches)
    assert network.strength.weight.grad.any()  # zero is no stationary point
    assert network.strength.weight.any()


def test_log_proportion_is_one_characteristic():
    engine = make_engine("conv", log_proportion=True)
    seen = []
    engine.perturbation.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (inputs, labels), meta_batch = make_batches("conv")
    engine.step((inputs, labels), meta_batch)
    share = torch.tensor([40, 20, 10]).double() / 70
    torch.testing.assert_close(seen[0][:, 5], share.log()[labels])
    other = make_engine("conv")
    other.perturbation.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    other.step((inputs, labels), meta_batch)
    torch.testing.assert_close(seen[-1][:, 5], share[labels])


def test_rate_free_gradients_do_not_fall_with_the_rate():
    def found(rate, **options):
        engine = make_engine("conv", **options)
        for group in engine.optimizer.param_groups:
            group["lr"] *= rate
        return hypergradients(engine, *make_batches("conv"))

    # To first order in η₁, that is for a small rate, the published ones are proportional to it.
    usual, small = found(1e-4), found(1e-6)
    for name in usual:
        ratio = float(small[name].norm() / usual[name].norm())
        assert ratio == pytest.approx(1e-2, rel=0.05), name
    options = {"rate_free_perturbation": True, "rate_free_covariance": True, "covariance_lr": 1.0}
    usual, small = found(1e-4, **options), found(1e-6, **options)
    for name in usual:
        assert float(small[name].norm() / usual[name].norm()) == pytest.approx(1.0, rel=0.05), name


@pytest.mark.parametrize("way", ["jvp", "double-backward"])
def test_rate_free_covariance_step_is_eta_2_over_eta_1(way):
    batches, changes = make_batches("conv"), []
    for options in ({"covariance_lr": 2.0}, {"covariance_lr": 0.4, "rate_free_covariance": True}):
        engine = make_engine("conv", hypergradient=way, **options)  # the head's rate is 0.2
        found = hypergradients(engine, *batches)
        changes.append(found["covariance"] * engine.covariance_lr)
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("way", ["jvp", "finite-difference", "double-backward"])
def test_a_rate_of_zero_moves_nothing_and_stays_finite(way):
    options = {"rate_free_perturbation": True, "rate_free_covariance": True}
    engine = make_engine("conv", hypergradient=way, **options)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    found = hypergradients(engine, *make_batches("conv"))
    assert not found["omega"].any()
    assert not found["covariance"].any()


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 0.3}, {"perturbation": None}])
def test_nothing_to_learn_is_a_plain_step(options):
    """One pass of the backbone, no meta batch, and the bits of a step with interval beyond it."""
    engine = make_engine("conv", covariance_lr=0.0, **options)
    twin = make_engine("conv", covariance_lr=1.0, interval=7, **options)
    if "perturbation" in options:
        engine.perturbation.requires_grad_(False)
    twin._steps = 1  # between two meta steps
    passes = []
    engine.classifier.backbone.register_forward_hook(lambda *_: passes.append(1))
    batch, _ = make_batches("conv")
    assert not engine.needs_meta_batch
    assert engine.meta_steps(3) == [False] * 3
    result = engine.step(batch)
    assert len(passes) == 1
    other = twin.step(batch)
    assert torch.equal(result.loss, other.loss)
    assert torch.isnan(result.meta_loss)
    for own, expected in zip(
        engine.classifier.parameters(), twin.classifier.parameters(), strict=True
    ):
        assert torch.equal(own, expected)


def test_covariance_lr_zero_spares_eq_9_alone():
    batches = make_batches("conv")
    engine, twin = make_engine("conv", covariance_lr=0.0), make_engine("conv", covariance_lr=1e-30)
    before = copy.deepcopy(engine.covariance)
    engine.step(*batches)
    twin.step(*batches)
    for own, expected in zip(
        engine.perturbation.parameters(), twin.perturbation.parameters(), strict=True
    ):
        assert torch.equal(own.grad, expected.grad)
    assert torch.equal(engine.covariance.covariance, twin.covariance.covariance)
    assert not torch.equal(before.covariance, engine.covariance.covariance)
    assert float(engine.covariance_change) == 0.0


@pytest.mark.parametrize("persistent", [True, False])
def test_relative_change_of_the_covariance(persistent):
    batch, meta_batch = make_batches("conv")
    engine = make_engine("conv", covariance_lr=10.0, persistent=persistent)
    assert torch.isnan(engine.covariance_change)
    streamed = copy.deepcopy(engine.covariance)
    features = copy.deepcopy(engine.classifier.backbone)(batch[0]).detach()
    streamed.update(features, batch[1])
    persisting = make_engine("conv", covariance_lr=10.0)
    persisting.step(batch, meta_batch)
    moved = (persisting.covariance.covariance - streamed.covariance).norm()
    engine.step(batch, meta_batch)
    expected = float(moved / streamed.covariance.norm())
    assert expected > 1e-6
    assert float(engine.covariance_change) == pytest.approx(expected, rel=1e-6)
    first = engine.covariance_change.clone()
    twin = make_engine("conv", covariance_lr=10.0, persistent=persistent)
    twin.load_state_dict(engine.state_dict())
    for one in (engine, twin):
        one.step(batch, meta_batch)
        assert torch.equal(one.covariance_change, first)  # of the epoch's first meta step
        one.end_epoch()
        assert torch.isnan(one.covariance_change)
        one.step(batch, meta_batch)
        assert float(one.covariance_change) > 0  # of the next epoch's


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"epsilon_scale": 0.0}, "epsilon_scale"),
        ({"epsilon_scale": float("nan")}, "epsilon_scale"),
        ({"epsilon_unit": "class"}, "epsilon_unit"),
    ],
)
def test_bad_units_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make_engine("mlp", **options)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        iada.TrainerConfig.from_settings(options)


def test_an_optimizer_of_other_parameters_is_refused():
    """Ω would keep its values without a word."""
    network, other = (iada.PerturbationNet().double() for _ in range(2))
    for parameters in (other.parameters(), network.hidden.parameters()):
        adam = torch.optim.Adam(parameters)
        with pytest.raises(ValueError, match=r"^perturbation_optimizer: expected .*; build it"):
            make_engine("mlp", perturbation=network, perturbation_optimizer=adam)
    with pytest.raises(ValueError, match="^perturbation_optimizer: expected"):
        make_engine("mlp", perturbation_optimizer=torch.optim.Adam(other.parameters()))
    hidden = torch.optim.Adam(network.hidden.parameters())
    network.requires_grad_(False).hidden.requires_grad_()
    make_engine("mlp", perturbation=network, perturbation_optimizer=hidden)


def test_parameters_put_in_place_of_those_that_the_optimizer_has_are_refused():
    engine, state = make_engine("mlp"), copy.deepcopy(make_engine("mlp").state_dict())
    batches = make_batches("mlp")
    engine.load_state_dict(state)
    engine.step(*batches)
    engine.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match=r"^perturbation_optimizer: expected .*assign=True"):
        engine.step(*batches)
    assert not engine.covariance.count.any()
    engine.sample_epsilon.optimizer = torch.optim.Adam(engine.perturbation.parameters())
    before = engine.perturbation.hidden.weight.clone()
    engine.step(*batches)
    assert not torch.equal(engine.perturbation.hidden.weight, before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"epsilon": 0.1, "perturbation": iada.PerturbationNet()}, "perturbation"),
        (
            {
                "epsilon": 0.0,
                "perturbation_optimizer": torch.optim.Adam(iada.PerturbationNet().parameters()),
            },
            "perturbation_optimizer",
        ),
        ({"perturbation": 0.1}, "perturbation"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": torch.tensor(0.1)}, "epsilon"),
    ],
)
def test_a_number_or_a_network(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+; .+"):
        make_engine("mlp", **options)


def test_settings_reach_the_engine():
    settings = {
        "ce_epochs": 0,
        "epochs": 1,
        "milestones": (),
        "perturbation_weight_decay": 0.01,
        "perturbation_hidden": 7,
        "without_characteristics": ["loss", "entropy"],
        "perturbation_init": "zero",
        "epsilon_scale": 0.1,
        "epsilon_unit": "class-deviation",
        "log_proportion": True,
        "rate_free_perturbation": True,
        "rate_free_covariance": True,
    }
    data = iada.TensorData(torch.randn(12, 4), torch.arange(12) % 3)

    def method(**changes):
        config = iada.TrainerConfig.from_settings({**settings, **changes})
        return iada.Trainer(torch.nn.Identity(), torch.nn.Linear(4, 3), data, data, config).method

    engine = method()
    assert tuple(engine.perturbation.hidden.weight.shape) == (7, 13)
    assert not engine.perturbation.strength.weight.any()
    assert engine.sample_epsilon.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert engine.sample_epsilon.log_proportion
    assert engine.sample_epsilon.scale == EpsilonScale(0.1, "class-deviation")
    assert engine.rate_free_perturbation
    assert engine.rate_free_covariance
    assert engine.needs_meta_batch
    assert len(engine.memory.samples) == len(data)
    assert not method(perturbation="untrained", covariance_lr=0.0).needs_meta_batch
    assert method(perturbation="untrained").needs_meta_batch
    with pytest.raises(ValueError, match="^epsilon: expected 0 with a perturbation"):
        method(perturbation="untrained", epsilon=0.1)
