"""MetaIADA as a module: what its state holds, where it moves, and methods of one's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iada
from tests.helpers.engine_cases import CLASSES, make_batches, make_engine


def test_the_classifier_is_no_part_of_it():
    meta = make_engine("mlp")
    own = {id(p) for p in meta.classifier.parameters()}
    assert not own & {id(p) for p in meta.parameters()}
    assert all("classifier" not in name for name in meta.state_dict())
    names = {"covariance.covariance", "covariance.mean", "covariance.count", "memory.class_means"}
    assert names <= set(meta.state_dict())
    assert any(name.startswith("sample_epsilon.perturbation.") for name in meta.state_dict())


def test_state_goes_through_a_file_and_another_module(tmp_path):
    """As Lightning and accelerate do it: a submodule's state, loaded without running code."""
    batches = make_batches("mlp")
    one, other = (nn.ModuleDict({"meta": make_engine("mlp", covariance_lr=1e-2)}) for _ in range(2))
    one["meta"].step(*batches)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other["meta"].classifier.load_state_dict(one["meta"].classifier.state_dict())
    other["meta"].optimizer.load_state_dict(copy.deepcopy(one["meta"].optimizer.state_dict()))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ends = []
    for model in (one, other):
        torch.manual_seed(3)
        model["meta"].step(*batches)
        ends.append([*model["meta"].classifier.parameters(), *model["meta"].parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_a_state_that_does_not_fit_is_refused():
    state = make_engine("mlp").state_dict()
    state["covariance.mean"] = torch.zeros(CLASSES + 1, 2)
    with pytest.raises(RuntimeError, match="size mismatch for covariance.mean"):
        make_engine("mlp").load_state_dict(state)


def test_to_moves_all_of_it():
    meta = make_engine("mlp").to("meta")
    tensors = [*meta.parameters(), *meta.buffers()]
    assert len(tensors) > 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert next(meta.classifier.parameters()).device.type == "cpu"
    assert meta._passes.device.type == "cpu"
    meta.classifier.to("meta")  # the caller's, moved after the method was built
    assert meta._passes.device.type == "meta"


def test_a_step_where_no_gradients_are_kept_is_a_step():
    ends = []
    for mode in (torch.enable_grad, torch.no_grad):
        meta, batches = make_engine("mlp"), make_batches("mlp")
        torch.manual_seed(0)
        with mode():
            meta.cross_entropy_step(batches[0])
            meta.step(*batches)
        ends.append([*meta.classifier.parameters(), *meta.perturbation.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_a_head_that_was_replaced_is_told_of():
    meta, batches = make_engine("mlp"), make_batches("mlp")
    meta.step(*batches)
    meta.head.weight = nn.Parameter(meta.head.weight.detach().clone())
    with pytest.warns(UserWarning, match="the head is not trained: .* as it is now"):
        meta.step(*batches)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clip_norm", -1.0, "clip_norm: expected a number from 0 on, got -1.0"),
        ("covariance", torch.zeros(3, 8, 8), "covariance: expected an iada.ClassCovariance, got a"),
    ],
)
def test_options_that_do_not_fit_are_named(name, value, message):
    backbone, head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=message):
        iada.MetaIADA(backbone, head, optimizer, torch.ones(CLASSES), **{name: value})


class Cosine(nn.Linear):
    """A head that is not Wh + b."""

    def forward(self, inputs):
        return F.linear(F.normalize(inputs), F.normalize(self.weight))


def test_what_cannot_be_trained_is_refused_at_once():
    backbone, head = nn.Linear(5, 4), nn.Linear(4, CLASSES)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    hooked = nn.Linear(4, CLASSES)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    lbfgs = torch.optim.LBFGS(head.parameters())
    for message, arguments in (
        ("head: expected an nn.Linear that is Wh \\+ b, got Cosine", (Cosine(4, 3), optimizer)),
        ("head: expected an nn.Linear that is Wh \\+ b, got Linear with", (hooked, optimizer)),
        ("optimizer: expected one that steps without a closure, got LBFGS", (head, lbfgs)),
        ("optimizer: expected a torch optimizer, got list", (head, [optimizer])),
    ):
        with pytest.raises(ValueError, match=message):
            Smoothed(backbone, *arguments)


class Tempered(iada.Method):
    """CE at a temperature that is learned."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.temperature = nn.Parameter(torch.ones(()))

    def loss(self, features, weight, bias, labels):
        return F.cross_entropy(F.linear(features, weight, bias) / self.temperature, labels)


@pytest.mark.parametrize("given", [True, False])
def test_a_parameter_of_the_methods_own_learns_if_the_optimizer_has_it(given):
    backbone, head = nn.Linear(5, 4), nn.Linear(4, CLASSES)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    method, data = Tempered(backbone, head, optimizer), make_data()
    if given:
        optimizer.add_param_group({"params": [method.temperature]})
    logits = head(backbone(data.inputs)) / method.temperature
    expected = torch.autograd.grad(F.cross_entropy(logits, data.labels), method.temperature)[0]
    method.step((data.inputs, data.labels))
    torch.testing.assert_close(1 - method.temperature.detach(), 0.1 * expected * given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: ["a.jpg"] * 6}, r"batch index: expected integer places .* \(6,\), one .* got a list"),
        ({2: torch.zeros(6)}, r"batch index: expected integer places .* got dtype torch.float32"),
        (
            {2: torch.ones(6, dtype=torch.bool)},
            "batch index: expected integer places .* torch.bool",
        ),
        ({2: torch.arange(5)}, r"batch index: expected integer places .*shape \(5,\)"),
        ({2: torch.arange(-1, 5)}, r"batch index: expected places in \[0, 50\).* got -1 to 4"),
        ({2: torch.arange(45, 51)}, r"batch index: expected places in \[0, 50\).* got 45 to 50"),
        ({0: torch.zeros(5, 6)}, r"backbone: expected features \(6, 8\), got shape \(5, 8\)"),
        ({1: torch.tensor(3)}, r"labels: expected integer class indices"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(change, message):
    method = make_engine("mlp", memory=iada.TrainingMemory(CLASSES, num_samples=50))
    parts = [torch.zeros(6, 6).double(), torch.arange(6) % CLASSES, torch.arange(6)]
    for place, value in change.items():
        parts[place] = value.double() if place == 0 else value
    count = method.covariance.count.clone()
    with pytest.raises(ValueError, match=message):
        method.step(tuple(parts), make_batches("mlp")[1])
    assert torch.equal(method.covariance.count, count)


def test_losses_are_remembered_in_both_phases_and_become_the_last_epochs():
    memory = iada.TrainingMemory(CLASSES, num_samples=50, dtype=torch.float64)
    method = make_engine("mlp", memory=memory)
    (inputs, labels), meta_batch = make_batches("mlp")
    first, second = torch.arange(20, 32), torch.arange(5, 17)
    loss = method.cross_entropy_step((inputs, labels, first))
    torch.testing.assert_close(memory.samples[first, 0].mean(), loss)
    method.step((inputs, labels, second), meta_batch)
    assert memory.seen.nonzero()[:, 0].tolist() == list(range(5, 17)) + list(range(20, 32))
    seen = torch.stack([memory.samples[first], memory.samples[second]])
    method.end_epoch()
    means = [seen[:, labels == c].mean(dim=(0, 1)) for c in range(CLASSES)]
    torch.testing.assert_close(memory.class_means, torch.stack(means))


def test_places_of_any_integer_dtype_are_places():
    method = make_engine("mlp", memory=iada.TrainingMemory(CLASSES, num_samples=50))
    batch, meta_batch = make_batches("mlp")
    index = torch.arange(len(batch[1]), dtype=torch.uint8)
    method.step((*batch[:2], index), (*meta_batch[:2], ["no", "places"]))
    assert int((method.memory.samples != 0).any(dim=-1).sum()) == len(index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_around_it_may_be_cast(dtype):
    """Its own state stays at float32 or better, and the step is that of such a classifier."""
    plain, cast = (make_engine("mlp", dtype=torch.float32) for _ in range(2))
    for engine in (plain, cast):
        engine.classifier.to(dtype)
    cast = nn.ModuleDict({"classifier": cast.classifier, "meta": cast}).to(dtype)["meta"]
    if dtype != torch.float64:
        assert not [b for b in cast.state_dict().values() if getattr(b, "dtype", None) == dtype]
        assert all(buffer.dtype != dtype for buffer in cast.buffers())
    (inputs, labels), (meta_inputs, meta_labels) = make_batches("mlp", dtype)
    losses = []
    for engine in (plain, cast):
        torch.manual_seed(2)
        losses.append(engine.step((inputs, labels), (meta_inputs, meta_labels)).loss)
    torch.testing.assert_close(*losses, check_dtype=False)
    assert torch.isfinite(cast.covariance.covariance).all()


@pytest.mark.parametrize("backbone_dtype", [torch.float32, torch.float64])
def test_a_network_of_another_dtype_than_the_features(backbone_dtype):
    def prepare(backbone, head):
        backbone.to(backbone_dtype)

    batches = make_batches("mlp", backbone_dtype)
    for head_dtype in (torch.float32, torch.float64):
        network = iada.PerturbationNet()
        meta = make_engine("mlp", dtype=head_dtype, prepare=prepare, perturbation=network)
        before = [parameter.clone() for parameter in network.parameters()]
        assert torch.isfinite(meta.step(*batches).loss)
        pairs = zip(before, network.parameters(), strict=True)
        assert any(not torch.equal(was, parameter) for was, parameter in pairs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_weights", [1.0, 1.0, 1.0]),
        ("class_weights", torch.ones(CLASSES - 1)),
        ("class_weights", -torch.ones(CLASSES)),
        ("class_weights", torch.full((CLASSES,), torch.inf)),
        ("covariance_lr", float("nan")),
        ("covariance_lr", -1.0),
        ("covariance_lr", torch.tensor(1e-3)),
        ("covariance", iada.ClassCovariance(CLASSES + 1, 8)),
        ("covariance", iada.ClassCovariance(CLASSES, 9)),
        ("memory", iada.TrainingMemory(CLASSES + 1)),
    ],
)
def test_arguments_that_do_not_fit(name, value):
    head = nn.Linear(8, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"(?s)^{name}: expected .+, got .+; .+"):
        iada.MetaIADA(nn.Identity(), head, optimizer, torch.ones(CLASSES), **{name: value})


def test_a_callers_class_weights_stay_the_callers():
    weights = torch.ones(CLASSES, dtype=torch.float64)
    meta = make_engine("mlp", class_weights=weights)
    weights[0] = 7.0
    assert meta.class_weights.tolist() == [1.0] * CLASSES


@pytest.mark.parametrize("step", ["step", "cross_entropy_step"])
def test_gradients_are_clipped_to_the_norm_that_was_asked_for(step):
    engines = [make_engine("mlp", epsilon=0.0, covariance_lr=0.0, clip_norm=n) for n in (0, 1e-2)]
    grads = []
    for engine in engines:
        torch.manual_seed(3)
        getattr(engine, step)(make_batches("mlp")[0])
        grads.append(torch.cat([p.grad.flatten() for p in engine.classifier.parameters()]))
    norm = grads[0].norm()
    torch.testing.assert_close(grads[1], grads[0] * (1e-2 / (norm + 1e-6)))  # as torch's own


def test_what_a_step_does_not_go_through_keeps_still():
    """Its gradient of the step before is no gradient of this one."""

    class Now(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other, self.uses_other = nn.Linear(5, 4), nn.Linear(4, 4), True

        def forward(self, inputs):
            hidden = self.first(inputs)
            return self.other(hidden) if self.uses_other else hidden

    backbone, head, data = Now(), nn.Linear(4, CLASSES), make_data()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    method = Smoothed(backbone, head, optimizer)
    method.step((data.inputs, data.labels))
    backbone.uses_other = False
    before = [parameter.clone() for parameter in backbone.other.parameters()]
    method.step((data.inputs, data.labels))
    assert all(map(torch.equal, before, backbone.other.parameters()))


class Smoothed(iada.Method):
    """CE with label smoothing: a method of one's own in three lines."""

    def loss(self, features, weight, bias, labels):
        return F.cross_entropy(F.linear(features, weight, bias), labels, label_smoothing=0.1)


def make_data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    inputs = torch.randn(60, 5, generator=generator) + 2 * F.one_hot(labels, 5)
    return iada.TensorData(inputs, labels)


def make_own(config, head=None, folder=None):
    torch.manual_seed(0)
    backbone, data = nn.Linear(5, 4), make_data()
    head = head or nn.Linear(4, CLASSES)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    method = Smoothed(backbone, head, optimizer)
    return iada.Trainer(backbone, head, data, None, config, folder=folder, method=method), data


def test_a_method_of_ones_own_in_the_trainer(tmp_path):
    config = iada.TrainerConfig(method=None, epochs=4, batch_size=10)
    trainer, data = make_own(config, folder=tmp_path)
    losses = [row["loss"] for row in trainer.fit()]
    assert trainer.config.ce_epochs == 0
    assert losses[-1] < 0.8 * losses[0]
    assert float(trainer.class_accuracy(data).mean()) > 0.8
    resumed, _ = make_own(config, folder=tmp_path)
    assert resumed.resume()
    for a, b in zip(trainer.backbone.parameters(), resumed.backbone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_method_of_ones_own_is_the_only_one():
    with pytest.raises(ValueError, match=r"^config.method: expected None .* got 'ce'; set"):
        make_own(iada.TrainerConfig(method="ce"))
    trainer, data = make_own(iada.TrainerConfig(method=None))
    with pytest.raises(ValueError, match=r"^method: expected one of this backbone and head"):
        iada.Trainer(
            trainer.backbone,
            nn.Linear(4, CLASSES),
            data,
            None,
            trainer.config,
            method=trainer.method,
        )
    with pytest.raises(ValueError, match=r"^method: expected one where the config has none"):
        iada.Trainer(trainer.backbone, trainer.head, data, None, trainer.config)


def test_a_method_without_a_loss_says_so():
    trainer, data = make_own(iada.TrainerConfig(method=None))
    method = iada.Method(trainer.backbone, trainer.head, trainer.optimizer)
    with pytest.raises(NotImplementedError, match="Method has neither `loss` nor a `step`"):
        method.step((data.inputs, data.labels))


def test_settings_of_another_method_are_refused():
    with pytest.raises(ValueError, match=r"^interval: expected a setting of the method 'ce'"):
        iada.TrainerConfig.from_settings({"method": "ce", "interval": 2})
    with pytest.raises(ValueError, match=r"^intervall: expected one of .*interval.* unknown key"):
        iada.TrainerConfig.from_settings({"method": "meta-iada", "intervall": 2})
    with pytest.raises(ValueError, match=r"^method: expected one of 'ce'.*got 'sgd'"):
        iada.TrainerConfig(method="sgd")
    config = iada.TrainerConfig.from_settings({"method": "ce"}, {"interval": 2, "epochs": 3})
    assert config == iada.TrainerConfig(method="ce", epochs=3)
    options = iada.MetaIADAOptions(interval=4)
    flat = {"method": "meta-iada", "interval": 4}
    assert iada.TrainerConfig(method=options) == iada.TrainerConfig.from_settings(flat)
    assert iada.TrainerConfig(method=options).settings()["interval"] == 4
