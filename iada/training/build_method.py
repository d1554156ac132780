"""The method of a run: built by the options of its configuration, or the caller's own."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.meta.method import Method
from iada.methods.options import MethodRun
from iada.training.config import TrainerConfig
from iada.utils.checks import argument_error
from iada.utils.distributed import Group


def build_method(
    config: TrainerConfig,
    backbone: nn.Module,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    class_counts: Tensor,
    train_set: Dataset,
    group: Group,
    num_workers: int = 0,
) -> Method:
    """The method that `config` names; ValueError if it names none."""
    if config.method is None:
        remedy = "pass one, or set TrainerConfig's"
        raise argument_error("method", "one where the config has none", "None", remedy)
    if group is not None and config.method.single_process:
        remedy = "start one process, or take another method"
        raise argument_error("method", f"one process for {config.method_name}", "several", remedy)
    settings = (config.epochs, config.ce_epochs, config.seed, config.clip_norm)
    parts = (backbone, head, optimizer, class_counts, train_set)
    run = MethodRun(*parts, *settings, group, num_workers)
    return config.method.build(run)


def check_own_method(
    method: Method, config: TrainerConfig, backbone: nn.Module, head: nn.Linear
) -> None:
    """ValueError unless it trains this classifier, and the config names no other."""
    if config.method is not None:
        got = repr(config.method_name)
        remedy = "set TrainerConfig(method=None), and ce_epochs if plain CE is to come first"
        raise argument_error("config.method", "None beside a method of your own", got, remedy)
    parts = method.classifier
    if parts.backbone is not backbone or parts.head is not head:
        remedy = "build it from the same two modules"
        raise argument_error("method", "one of this backbone and head", "another's", remedy)
