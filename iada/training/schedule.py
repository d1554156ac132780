"""The optimizer of the classifier and how its learning rate changes."""

import inspect
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from iada.training.config import TrainerConfig
from iada.utils.checks import argument_error

WARMUP_START = 0.01  # share of lr that warm-up starts from


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainerConfig) -> Optimizer:
    """`config.optimizer` of torch.optim over those parameters that are trained.

    Raises ValueError for options that it does not take, or values that it refuses.
    """
    kind = getattr(torch.optim, config.optimizer)
    known = inspect.signature(kind).parameters
    common = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    options = {name: value for name, value in common.items() if name in known}
    unknown = [name for name in config.optimizer_options if name not in known]
    if unknown:
        taken = ", ".join(name for name in known if name not in ("params", *common))
        expected, remedy = f"some of {taken}", "rename or remove it"
        raise argument_error("optimizer_options", expected, repr(unknown[0]), remedy)
    trained = [p for p in parameters if p.requires_grad]
    try:
        return kind(trained, **options | config.optimizer_options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer_options: expected what torch.optim.{config.optimizer} takes, got "
            f"{config.optimizer_options} ({error}); mend them"
        ) from error


def build_schedule(optimizer: Optimizer, config: TrainerConfig, steps: int) -> LRScheduler:
    """Warm-up, then `config.schedule`; to be stepped once an epoch or, on demand, once a step.

    A last stage, as AFR's second, has a cosine of its own. steps: of one epoch.
    """
    unit = steps if config.schedule_each == "step" else 1
    last_epochs, last_lr = config.last_stage
    warmup, total = round(config.warmup_epochs * unit), (config.epochs - last_epochs) * unit
    if config.schedule == "cosine":
        main: LRScheduler = lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup))
    else:
        marks = config.milestones if config.schedule == "multistep" else ()
        # The main schedule counts from the end of warm-up, milestones from the start of the run.
        steps_to = [mark * unit - warmup for mark in marks]
        main = lr_scheduler.MultiStepLR(optimizer, steps_to, config.gamma)
    parts, ends = [main], []
    if warmup:
        rise = lr_scheduler.LinearLR(optimizer, WARMUP_START, total_iters=warmup)
        parts, ends = [rise, main], [warmup]
    if last_epochs:
        length, share = last_epochs * unit, last_lr / config.lr

        def fall(step: int) -> float:
            return share * (1 + math.cos(math.pi * min(step, length) / length)) / 2

        parts.append(lr_scheduler.LambdaLR(optimizer, fall))
        ends.append(total)
    return lr_scheduler.SequentialLR(optimizer, parts, ends) if ends else main
