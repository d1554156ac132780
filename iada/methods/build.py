"""From the settings of a run to the method that trains it."""

import torch
from torch import Tensor, nn

from iada.covariance import ClassCovariance
from iada.distributed import Group, broadcast
from iada.engine.meta import MetaIADA
from iada.methods.first_order import FirstOrder
from iada.methods.method import Method
from iada.perturbation import PerturbationNet
from iada.sample_characteristics import TrainingMemory
from iada.training.config import TrainerConfig


def build_method(
    config: TrainerConfig,
    backbone: nn.Module,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    class_counts: Tensor,
    num_samples: int,
    group: Group = None,
) -> Method:
    """The method that `config` names.

    Args:
        backbone, head, optimizer, class_counts: as in `MetaIADA`.
        num_samples: size of the training set.
        group: of the processes that share each batch.
    """
    shared = (backbone, head, optimizer, class_counts)
    device, dtype = head.weight.device, torch.promote_types(torch.float32, head.weight.dtype)
    covariance = None
    if config.method in ("isda", "meta-iada"):
        covariance = ClassCovariance(head.out_features, head.in_features, config.structure)
        covariance.to(device, dtype)
    if config.method != "meta-iada":
        return FirstOrder(
            *shared,
            covariance=covariance,
            alpha=config.alpha,
            beta=config.beta if config.method == "logit-adjustment" else 0.0,
            clip_norm=config.clip_norm,
            process_group=group,
        )
    perturbation = PerturbationNet().to(device, dtype)
    broadcast([*perturbation.parameters(), *perturbation.buffers()], group)
    return MetaIADA(
        *shared,
        perturbation=perturbation,
        perturbation_optimizer=torch.optim.Adam(
            perturbation.parameters(), lr=config.perturbation_lr
        ),
        covariance=covariance,
        memory=TrainingMemory(head.out_features, num_samples).to(device, dtype),
        alpha=config.alpha,
        beta=config.beta,
        covariance_lr=config.covariance_lr,
        persistent=config.persistent,
        project=config.project,
        clip_norm=config.clip_norm,
        hypergradient=config.hypergradient,
        scope=config.scope,
        interval=config.interval,
        low_memory=config.low_memory,
        process_group=group,
    )
