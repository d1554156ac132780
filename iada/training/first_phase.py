"""What the epochs of plain CE leave, in one file from which several runs start: T1 of Algorithm 1.

Runs that agree in data, seed and the settings of these epochs would otherwise each train the same
classifier. The file is plain: weights, buffers and the optimizer's moments by name, the last
epoch's losses and margins, and the history. It does not change with the format of checkpoints.
"""

import json
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iada.methods.meta_iada import MetaSAugOptions
from iada.training.config import TrainerConfig
from iada.training.trainer import Trainer
from iada.utils import seeds
from iada.utils.checks import argument_error
from iada.utils.distributed import rank_of
from iada.utils.files import atomic_write, load_plain

FORMAT = "iada-first-phase-1"
# All settings that these epochs depend on, beside ce_epochs; files are known by a digest of them. A
# new one enters it only where it is not what it was before there was a choice.
OPTIMIZER = ("batch_size", "optimizer", "lr", "momentum", "weight_decay", "optimizer_options")
SCHEDULE = ("schedule", "milestones", "gamma", "warmup_epochs", "schedule_each")
SETTINGS = (*OPTIMIZER, *SCHEDULE, "clip_norm", "seed", "autocast", "channels_last", "compile")


def can_share(config: TrainerConfig) -> bool:
    """Whether the run begins with epochs of CE that do not depend on what comes after them."""
    return (
        config.method is not None
        and not config.method.own_cross_entropy
        and not config.schedule_spans_run
        and config.warmup_epochs < config.ce_epochs
    )


def first_phase_config(config: TrainerConfig) -> TrainerConfig:
    """The settings of a run of these epochs alone, the same for all runs that share them."""
    chosen = {name: getattr(config, name) for name in SETTINGS}
    marks = tuple(mark for mark in config.milestones if mark < config.ce_epochs)
    chosen["milestones"] = marks
    if not marks:  # how far the rate falls later is the second phase's
        chosen |= {"gamma": 0.1, "schedule": "constant"}
    # Of the methods, this one keeps losses and margins without drawing random numbers of its own.
    return TrainerConfig(
        method=MetaSAugOptions(covariance_lr=0.0, structure="diag"),
        epochs=config.ce_epochs,
        ce_epochs=config.ce_epochs,
        **chosen,
    )


def digest(config: TrainerConfig, data: dict[str, Any]) -> str:
    """32 hexadecimal digits of the settings of these epochs and of `data`, plain values."""
    own = first_phase_config(config)
    chosen = {name: getattr(own, name) for name in SETTINGS}
    content = {"format": FORMAT, "epochs": own.epochs, "settings": chosen, "data": data}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def first_phase_state(trainer: Trainer) -> dict[str, Any]:
    """What `start_from` takes, of a trainer between two epochs that were of CE."""
    moments = trainer.optimizer.state_dict()["state"]
    memory = getattr(trainer.method, "memory", None)
    named = enumerate(_names(trainer))
    return {
        "format": FORMAT,
        "epoch": trainer.epoch,
        "backbone": trainer.backbone.state_dict(),
        "head": trainer.head.state_dict(),
        "optimizer": {name: moments[place] for place, name in named if place in moments},
        "memory": None if memory is None else memory.state_dict(),
        "history": trainer.history,
        "random_state": seeds.capture(trainer.head.weight.device),
    }


def start_from(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go on from the epoch that `state` was left at, by the trainer's own schedule.

    Learning rates are the trainer's. What the method itself begins with, as Ω, is as it was built.
    ValueError if the model is another; the trainer is not to be used then.
    """
    if state["epoch"] > trainer.config.ce_epochs:
        expected = f"at most ce_epochs={trainer.config.ce_epochs} epochs"
        raise argument_error("first phase", expected, state["epoch"], "take another file")
    names, moments = _names(trainer), state["optimizer"]
    try:
        trainer.backbone.load_state_dict(state["backbone"])
        trainer.head.load_state_dict(state["head"])
        unknown = set(moments) - set(names)
        if unknown:
            raise KeyError(min(unknown))
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        remedy = "take the file of the same backbone and head"
        raise argument_error("first phase", "the model of this run", reason, remedy) from error
    optimizer = trainer.optimizer.state_dict()
    optimizer["state"] = {
        place: moments[name] for place, name in enumerate(names) if name in moments
    }
    trainer.optimizer.load_state_dict(optimizer)
    per_epoch = 1
    if trainer.config.schedule_each == "step":
        count, size = len(trainer.train_set), trainer.config.batch_size  # type: ignore[arg-type]
        per_epoch = max(1, -(-count // size))
    with warnings.catch_warnings():  # torch expects a step of the optimizer between two of these
        warnings.simplefilter("ignore")
        for _ in range(state["epoch"] * per_epoch):
            trainer.scheduler.step()
    memory = getattr(trainer.method, "memory", None)
    if memory is not None and state["memory"] is not None:
        memory.load_state_dict(state["memory"])
    trainer.epoch, trainer.batch = state["epoch"], 0
    trainer.history = [dict(row) for row in state["history"]]
    device, rank = trainer.head.weight.device, rank_of(trainer.group)
    if rank == 0:
        seeds.restore(state["random_state"], device)
    else:  # else all ranks would draw the same dropout masks
        seeds.seed_all(seeds.seed_of(trainer.config.seed, rank, state["epoch"]), device)


def save_first_phase(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, all or nothing."""
    with atomic_write(path) as file:
        torch.save(state, file)


def load_first_phase(path: Path) -> dict[str, Any]:
    """The inverse, on the CPU, read without running code; ValueError for a damaged file."""
    return load_plain(path, "a first phase", "delete it, it is made anew", FORMAT)


def _names(trainer: Trainer) -> list[str]:
    """Of the optimizer's parameters, in its order."""
    known: dict[Tensor, str] = {p: f"head.{n}" for n, p in trainer.head.named_parameters()}
    known |= {p: f"backbone.{n}" for n, p in trainer.backbone.named_parameters()}
    groups = trainer.optimizer.param_groups
    return [known[parameter] for group in groups for parameter in group["params"]]
