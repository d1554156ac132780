"""Autocast, channels-last and compilation change the speed of a run, not what is trained."""

import functools

import pytest
import torch
from torch import nn

import iada
from iada.models import cifar_resnet
from iada.utils.evaluate import outputs

CLASSES = 4


def make(method, **options):
    torch.manual_seed(0)
    labels = torch.arange(24) % CLASSES
    images = torch.randn(24, 3, 8, 8) + labels.view(-1, 1, 1, 1)
    data = iada.TensorData(images, labels)
    settings = {"epochs": 2, "ce_epochs": 1, "batch_size": 12, "meta_batch_size": 8, "lr": 0.05}
    config = iada.TrainerConfig.from_settings({"method": method, **settings}, options)
    meta = data if method == "meta-iada" else None
    trainer = iada.Trainer(
        cifar_resnet(8, 4), nn.Linear(16, CLASSES), data, meta, config, measure=measure
    )
    return trainer, data


def measure(trainer):
    return {"norm": trainer.head.weight.detach().norm().item(), "nothing": None}


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.backbone.parameters()])


METHODS = ["ce", "isda", "meta-iada"]


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_is_the_same_run(method):
    plain, _ = make(method)
    plain.fit()
    other, _ = make(method, channels_last=True)
    seen = []
    other.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    other.fit()
    assert other.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    images = [x for x in seen if x.shape[0] > 1]
    assert images
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
    # Four steps of SGD at rates that multiply rounding by some hundreds.
    torch.testing.assert_close(parameters(other), parameters(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_reaches_the_backbone_alone(method):
    trainer, data = make(method, autocast="bfloat16")
    seen = set()
    trainer.backbone[0].register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    trainer.fit()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.backbone.parameters()} == {torch.float32}
    if trainer.method.covariance is not None:
        assert trainer.method.covariance.covariance.dtype == torch.float32
    plain, _ = make(method)
    plain.fit()
    losses = [[row["loss"] for row in run.history] for run in (trainer, plain)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0.05, atol=0)
    assert trainer.class_accuracy(data).shape == (CLASSES,)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("method", METHODS)
def test_compiled_passes_are_the_same_run(method, monkeypatch):
    # The tracing is the same as with the default backend, whose C++ takes minutes to compile.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, _ = make(method, hypergradient="finite-difference")
    plain.fit()
    other, _ = make(method, hypergradient="finite-difference", compile=True)
    other.fit()
    torch.testing.assert_close(parameters(other), parameters(plain), rtol=1e-2, atol=1e-3)
    other.load_state_dict(other.state_dict())


def test_measure_goes_into_the_history_and_the_checkpoint():
    trainer, _ = make("ce")
    trainer.fit()
    assert [set(row) for row in trainer.history] == [{"epoch", "loss", "norm", "nothing"}] * 2
    assert trainer.history[1]["norm"] == trainer.head.weight.detach().norm().item()
    assert trainer.state_dict()["history"] == trainer.history


def test_what_measures_sees_the_model_as_it_is_evaluated():
    trainer, _ = make("ce")
    modes = []
    trainer.measure = lambda own: {"seen": modes.append(own.backbone.training or own.head.training)}
    trainer.fit()
    assert modes == [False, False]
    assert trainer.backbone.training


def test_outputs_are_in_the_order_of_the_data():
    trainer, data = make("ce")
    trainer.fit()
    found = trainer.outputs(data, batch_size=5)
    assert torch.equal(found.labels, data.labels)
    with torch.no_grad():
        trainer.backbone.eval()
        features = trainer.backbone(data.inputs)
        torch.testing.assert_close(found.features, features)
        torch.testing.assert_close(found.logits, trainer.head(features))
    rows = torch.tensor([4, 1, 7])
    some = trainer.outputs(data, batch_size=2, rows=rows)
    assert torch.equal(some.labels, data.labels[rows])
    torch.testing.assert_close(some.features, features[rows])


class FromWorkers(iada.TensorData):
    """Tells of each sample whether a worker has read it."""

    def __getitem__(self, index):
        inputs = self.inputs[index] * 0 + (torch.utils.data.get_worker_info() is not None)
        return inputs, self.labels[index], index


def test_evaluation_reads_in_workers_too():
    served = FromWorkers(torch.randn(6, 3), torch.arange(6) % CLASSES)
    for workers in (0, 2):
        found = outputs(nn.Identity(), nn.Linear(3, CLASSES), served, num_workers=workers)
        assert found.features.unique().tolist() == [float(workers > 0)]


def test_float16_is_refused():
    with pytest.raises(ValueError, match="autocast: expected one of 'none', 'bfloat16'"):
        iada.TrainerConfig(autocast="float16")
