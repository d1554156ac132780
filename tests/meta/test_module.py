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
