"""The optimizer by its name, and how its learning rate changes."""

import math
import os
import signal

import pytest
import torch

import iada
from iada.models import mlp
from iada.training.checkpoint import load_checkpoint
from iada.training.schedule import build_optimizer, build_schedule
from tests.helpers.training import SETTINGS, differences, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def rates(steps=1, **settings):
    """The learning rate of each step of a run of `steps` steps an epoch."""
    config = iada.TrainerConfig.from_settings({**SETTINGS, **settings})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, steps)
    seen = []
    for _ in range(config.epochs):
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if config.schedule_each == "step":
                schedule.step()
        if config.schedule_each == "epoch":
            schedule.step()
    return seen


def test_warm_up_then_cosine():
    seen = rates(epochs=10, warmup_epochs=4, lr=1.0)
    assert seen[:5] == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0])
    cosine = [0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
    assert seen[4:] == pytest.approx(cosine, abs=1e-6)


def test_milestones_count_from_the_start_of_the_run():
    settings = {"schedule": "multistep", "milestones": (3, 5), "gamma": 0.1, "lr": 1.0}
    assert rates(epochs=6, warmup_epochs=0, **settings) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])
    warm = rates(epochs=6, warmup_epochs=2, **settings)
    assert warm == pytest.approx([0.01, 0.505, 1, 0.1, 0.1, 0.01])


def test_a_last_stage_has_a_cosine_of_its_own():
    stage = {"method": "afr", "epochs": 8, "finetune_epochs": 4, "finetune_lr": 0.5, "lr": 1.0}
    found = rates(**stage, schedule="constant", warmup_epochs=0)
    cosine = [0.25 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert found == pytest.approx([1.0] * 4 + cosine)


@pytest.mark.parametrize("each", ["epoch", "step"])
def test_the_trainer_moves_it_as_often_as_asked(each):
    trainer = make_trainer(method="ce", ce_epochs=0, epochs=3, schedule_each=each)
    trainer.fit()
    assert trainer.scheduler.last_epoch == (3 if each == "epoch" else 3 * 6)  # 44 rows in eights


def test_schedules_may_move_every_step():
    seen = rates(steps=4, epochs=3, warmup_epochs=0.5, schedule_each="step", lr=1.0)
    assert seen[:3] == pytest.approx([0.01, 0.505, 1.0])
    assert len(set(seen)) == 12
    constant = rates(steps=4, epochs=3, warmup_epochs=0, schedule="constant", lr=1.0)
    assert set(constant) == {1.0}


@pytest.mark.parametrize("each", ["epoch", "step"])
@pytest.mark.parametrize("schedule", ["cosine", "multistep"])
def test_schedules_resume(tmp_path, each, schedule):
    settings = {
        "schedule": schedule,
        "milestones": (2, 4),
        "warmup_epochs": 2.0,
        "schedule_each": each,
        "optimizer": "AdamW",
        "lr": 0.01,
    }

    def stop(trainer, batch, result):
        if (trainer.epoch, trainer.batch) == (4, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    make_trainer(tmp_path / "whole", **settings).fit()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "part", observe=stop, **settings).fit()
    rest = make_trainer(tmp_path / "part", **settings)
    rest.resume()
    rest.fit()
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "part")]
    assert differences(*states) == []


def test_optimizers_by_name():
    parameters = list(mlp(8, (4,), 3)[0].parameters())
    parameters[0].requires_grad_(False)
    options = {"betas": [0.9, 0.98], "eps": 1e-6}
    config = iada.TrainerConfig(optimizer="AdamW", optimizer_options=options, weight_decay=0.1)
    optimizer = build_optimizer(parameters, config)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(parameters) - 1
    assert list(group["betas"]) == [0.9, 0.98]
    assert (group["eps"], group["weight_decay"], group["lr"]) == (1e-6, 0.1, 0.1)
    sgd = build_optimizer(parameters, iada.TrainerConfig(optimizer_options={"nesterov": True}))
    assert sgd.param_groups[0]["nesterov"]
    assert sgd.param_groups[0]["momentum"] == 0.9
