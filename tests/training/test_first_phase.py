"""Epochs of plain CE that several runs share."""

import dataclasses

import pytest
import torch
from torch import nn

import iada
from iada.training.first_phase import (
    SETTINGS,
    can_share,
    digest,
    first_phase_config,
    first_phase_state,
    load_first_phase,
    save_first_phase,
    start_from,
)
from iada.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3
CONFIG = iada.TrainerConfig(
    method=iada.MetaIADAOptions(covariance_lr=0.1),
    epochs=5,
    ce_epochs=3,
    milestones=(2, 3, 4),
    batch_size=8,
    meta_batch_size=6,
    gamma=0.5,
)
# Settings of the method's own epochs, of what is written, and those that `digest` has as `epochs`.
LATER = {"method", "epochs", "ce_epochs", "meta_batch_size", "loss_limit", "checkpoint_every"}


def changed(**settings):
    """CONFIG with other settings; of another method, with what they share."""
    return iada.TrainerConfig.from_settings(settings, CONFIG.settings())


def data(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    inputs = torch.randn(rows, 2, 6, 6, generator=generator) + labels[:, None, None, None]
    return iada.TensorData(inputs, labels)


def make_trainer(config, folder=None, **options):
    torch.manual_seed(config.seed)
    backbone = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    meta = data(6, 1)
    return Trainer(
        backbone, nn.Linear(4, CLASSES), data(30, 0), meta, config, folder=folder, **options
    )


def shared(config, tmp_path, stop=None):
    """The trainer of `config` after a first phase of its own, saved and loaded."""
    phase_config = first_phase_config(config)
    if stop is not None:
        phase_config = dataclasses.replace(
            phase_config, epochs=stop, ce_epochs=stop, milestones=(), gamma=0.1
        )
    phase = make_trainer(phase_config)
    phase.fit()
    save_first_phase(tmp_path / "phase.pt", first_phase_state(phase))
    trainer = make_trainer(config)
    start_from(trainer, load_first_phase(tmp_path / "phase.pt"))
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "meta-iada"},
        {"method": "metasaug"},
        {"method": "meta-iada", "perturbation": "constant", "epsilon": 0.2},
        {"schedule_each": "step"},
        {"warmup_epochs": 1.5, "schedule_each": "step"},
        {"optimizer": "Adam", "lr": 0.01},
    ],
    ids=str,
)
def test_runs_from_a_shared_phase_are_the_same_to_the_bit(settings, tmp_path):
    config = changed(**settings)
    whole, other = make_trainer(config), shared(config, tmp_path)
    assert other.epoch == 3
    whole.fit()
    other.fit()
    for name in ("backbone", "head"):
        expected = getattr(whole, name).state_dict()
        for key, value in getattr(other, name).state_dict().items():
            assert torch.equal(value, expected[key]), key
    assert torch.equal(whole.method.covariance.covariance, other.method.covariance.covariance)
    assert other.history == whole.history
    assert other.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("method", ["ce", "logit-adjustment", "isda", "meta-weight-net"])
def test_other_methods_start_from_it_too(method, tmp_path):
    """Their own epochs of CE differ by the rounding of another kernel."""
    config = changed(method=method)
    whole, other = make_trainer(config), shared(config, tmp_path)
    whole.fit()
    other.fit()
    for own, expected in zip(other.backbone.parameters(), whole.backbone.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_each_run_has_its_own_rate_after_it(tmp_path):
    config = dataclasses.replace(CONFIG, milestones=(3,))
    for gamma in (0.1, 0.01):
        trainer = shared(dataclasses.replace(config, gamma=gamma), tmp_path)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(config.lr * gamma)
        momentum = trainer.optimizer.state[next(trainer.backbone.parameters())]["momentum_buffer"]
        assert momentum.any()


def test_a_part_of_it_is_gone_on_from(tmp_path):
    config = dataclasses.replace(CONFIG, milestones=())
    phase = make_trainer(first_phase_config(config))
    part = shared(config, tmp_path, stop=2)
    resumed = make_trainer(first_phase_config(config))
    start_from(resumed, first_phase_state(part))
    assert resumed.epoch == 2
    for trainer in (phase, resumed):
        trainer.fit()
    for own, expected in zip(
        resumed.backbone.parameters(), phase.backbone.parameters(), strict=True
    ):
        assert torch.equal(own, expected)
    for key, value in phase.method.memory.state_dict().items():
        assert torch.equal(resumed.method.memory.state_dict()[key], value), key


def test_every_setting_is_of_the_first_phase_or_not():
    """A new one must be placed: forgotten, runs that differ in it would share what they may not."""
    fields = {field.name for field in dataclasses.fields(iada.TrainerConfig)}
    assert fields - LATER == set(SETTINGS)


CHANGES = {
    "batch_size": 9,
    "optimizer": "RMSprop",
    "lr": 0.2,
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "optimizer_options": {"nesterov": True},
    "schedule": "constant",
    "milestones": (1,),
    "gamma": 0.25,
    "warmup_epochs": 1.0,
    "schedule_each": "step",
    "clip_norm": 3.0,
    "seed": 1,
    "autocast": "bfloat16",
    "channels_last": True,
    "compile": True,
    "ce_epochs": 4,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_it_depends_on_changes_its_digest(name):
    other = dataclasses.replace(CONFIG, **{name: CHANGES[name]})
    assert digest(other, {}) != digest(CONFIG, {})
    assert digest(CONFIG, {"images": 1}) != digest(CONFIG, {"images": 2})


def test_what_comes_later_does_not_change_its_digest():
    later = {
        "method": "isda",
        "epochs": 9,
        "milestones": (2, 3, 7),  # 3 is the first of the second phase
        "alpha": 0.1,
    }
    assert digest(changed(**later), {}) == digest(CONFIG, {})
    assert digest(changed(covariance_lr=0.0, interval=3), {}) == digest(CONFIG, {})
    marks = dataclasses.replace(CONFIG, milestones=(4,), gamma=0.01)
    assert digest(marks, {}) == digest(dataclasses.replace(marks, gamma=0.1), {})


def test_a_digest_does_not_change_with_the_program():
    """Files that were made before are found by it: change FORMAT if it must."""
    settings = {
        "epochs": 200,
        "ce_epochs": 160,
        "milestones": (160, 180),
        "clip_norm": 0.0,
        "autocast": "bfloat16",
        "channels_last": True,
    }
    assert (
        digest(iada.TrainerConfig.from_settings(settings), {}) == "4e871311ea0d457e87e96fa5fb782070"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ldam-drw"},
        {"method": "cmo"},
        {"schedule": "cosine"},
        {"ce_epochs": 0},
        {"warmup_epochs": 3.0},
    ],
    ids=str,
)
def test_what_is_not_shared(settings):
    assert can_share(CONFIG)
    assert not can_share(changed(**settings))


def test_errors(tmp_path):
    trainer = shared(CONFIG, tmp_path)
    state = first_phase_state(trainer)
    with pytest.raises(ValueError, match="^first phase: expected at most ce_epochs=2"):
        start_from(make_trainer(dataclasses.replace(CONFIG, ce_epochs=2)), state)
    foreign = {**state, "optimizer": {**state["optimizer"], "backbone.9.weight": {}}}
    with pytest.raises(ValueError, match=r"^first phase: .* got 'backbone\.9\.weight'; take the"):
        start_from(make_trainer(CONFIG), foreign)
    state["head"]["weight"] = torch.zeros(CLASSES, 5)
    with pytest.raises(ValueError, match="^first phase: expected the model of this run"):
        start_from(make_trainer(CONFIG), state)
    path = tmp_path / "phase.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected a first phase, got a file that cannot be read"):
        load_first_phase(path)
    torch.save({"format": "other"}, path)
    with pytest.raises(ValueError, match="of format 'iada-first-phase-1', got 'other'"):
        load_first_phase(path)
