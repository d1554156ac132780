"""Every method on scikit-learn's digits, long-tailed: trains, beats chance, and resumes.

And on labels of any integer dtype.
"""

import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import iada
from iada.experiments.experiment import Limits, make_split, read_parts
from iada.experiments.recipe import load
from iada.methods.registry import METHODS
from iada.models import mlp
from tests.helpers.training import differences

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PASTING = ("cmo", "afr")  # need images
OWN = {
    "afr": {"finetune_epochs": 4},
    "isda": {"alpha_ramp": True},
    "metasaug": {"ce_epochs": 6, "covariance_lr": 0.1},
    "risda": {"ce_epochs": 6},
    "meta-iada": {"ce_epochs": 6},
}


@pytest.fixture(scope="module")
def split():
    pytest.importorskip("sklearn")
    recipe = load("digits/long-tail")
    return make_split(recipe, read_parts(recipe, None, Limits()), 0)


def conv():
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(128, 10)


def served(part, method):
    inputs = part.inputs / 255
    groups = 2 * part.labels + (torch.arange(len(inputs)) % 3 > 0)
    return iada.TensorData(inputs if method in PASTING else inputs.flatten(1), part.labels, groups)


def make_trainer(split, method, folder=None, observe=None, **settings):
    torch.manual_seed(0)
    backbone, head = conv() if method in PASTING else mlp(64, (128, 64), 10)
    backbone.append(nn.Dropout(0.1))
    common = {"epochs": 14, "ce_epochs": 0, "batch_size": 32, "schedule": "cosine", "alpha": 0.1}
    own = {"method": method, **OWN.get(method, {}), **settings}
    config = iada.TrainerConfig.from_settings(own, common)
    train, meta = served(split.train, method), served(split.meta, method)
    return iada.Trainer(backbone, head, train, meta, config, folder=folder, observe=observe)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_beats_chance(split, method):
    trainer = make_trainer(split, method)
    history = trainer.fit()
    assert len(history) == 14
    accuracy = trainer.class_accuracy(served(split.test, method))
    assert float(accuracy.mean()) > 0.6  # chance is 0.1


FORMS = (
    ("group-dro", {"balanced_batches": True, "generalization_adjustment": 1.0}),
    (
        "meta-weight-net",
        {"normalized": True, "through_loss": True, "perturbation_optimizer": "SGD"},
    ),
)


@pytest.mark.parametrize(
    ("method", "settings"), [*((method, {}) for method in METHODS), *FORMS], ids=str
)
def test_every_method_resumes_bit_for_bit(split, tmp_path, method, settings):
    whole = make_trainer(split, method, **settings)
    whole.fit()

    def stop(trainer, batch, result):
        if (trainer.epoch, trainer.batch) == (11, 3):  # AFR's second stage has begun
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(split, method, tmp_path, stop, **settings).fit()
    rest = make_trainer(split, method, tmp_path, **settings)
    assert rest.resume()
    assert (rest.epoch, rest.batch) == (11, 4)
    rest.fit()
    assert differences(rest.state_dict(), whole.state_dict()) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("method", METHODS)
def test_labels_of_narrow_dtypes(method, dtype):
    """The last of 130 classes: neither C + y nor C·y fits into a byte."""

    def trained(dtype):
        torch.manual_seed(0)
        rows = torch.arange(60)
        labels, tail = 120 + rows % 10, 5 * (rows >= 40)
        images = torch.rand(60, 1, 4, 4) + 4 * torch.eye(16)[rows % 10 + tail].view(60, 1, 4, 4)
        data = TensorDataset(images, labels.to(dtype))
        data.groups = rows % 4
        backbone, head = nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), nn.Linear(8, 130)
        own = {"method": method, **OWN.get(method, {}), "ce_epochs": 2 * (method not in PASTING)}
        if method == "afr":
            own["mix_fraction"] = 1.0
        config = iada.TrainerConfig.from_settings({**own, "epochs": 6, "batch_size": 20})
        trainer = iada.Trainer(backbone, head, data, data, config, validation_set=data)
        trainer.fit()
        return trainer.state_dict()

    assert differences(trained(dtype), trained(torch.int64)) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"beta": 0.0},
        {"perturbation": "constant"},
        {"perturbation": "constant", "epsilon": 0.2},
        {"scope": "head"},
    ],
    ids=str,
)
def test_ablations_of_meta_iada(split, settings):
    trainer = make_trainer(split, "meta-iada", **settings)
    trainer.fit()
    accuracy = trainer.class_accuracy(served(split.test, "meta-iada"))
    assert float(accuracy.mean()) > 0.6
    whole = make_trainer(split, "meta-iada")
    whole.fit()
    assert not torch.equal(whole.head.weight, trainer.head.weight)


def test_afr_s_second_stage_has_a_rate_of_its_own(split):
    seen = []
    trainer = make_trainer(split, "afr", schedule="multistep", milestones=[5, 8], gamma=0.1)

    def note(trainer, batch, result):
        if not trainer.batch:
            seen.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.observe = note
    trainer.fit()
    half = 2**-0.5
    cosine = [0.01, 0.01 * (1 + half) / 2, 0.005, 0.01 * (1 - half) / 2]
    assert seen == pytest.approx([0.1] * 5 + [0.01] * 3 + [0.001] * 2 + cosine)


@pytest.mark.parametrize("method", ["ldam-drw", "cmo", "afr"])
def test_epochs_of_a_staged_method_are_not_free(split, tmp_path, method):
    make_trainer(split, method, tmp_path, schedule="constant").save()
    other = make_trainer(split, method, tmp_path, schedule="constant", epochs=20)
    with pytest.raises(ValueError, match="checkpoint's epochs: expected 20"):
        other.resume()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"method": "afr", "ce_epochs": 160}, "finetune_epochs"),
        ({"class_beta": 1.0}, "class_beta"),
        ({"focal_gamma": -1.0}, "focal_gamma"),
        ({"reweight_from": 1.5}, "reweight_from"),
        ({"perturbation": "none"}, "perturbation"),
        ({"epsilon": 0.5}, "epsilon"),
        ({"finetune_lr": 0.0}, "finetune_lr"),
    ],
)
def test_settings_are_checked(settings, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got .*; "):
        iada.TrainerConfig.from_settings(settings)
