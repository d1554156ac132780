"""From the settings of a run to the method that trains it."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.meta.meta_iada import MetaIADA
from iada.methods.afr import AFR
from iada.methods.base import Method
from iada.methods.class_balanced import ClassBalanced
from iada.methods.cmo import CMO
from iada.methods.head_loss import FirstOrder
from iada.methods.ldam import LDAM
from iada.methods.meta_weight_net import MetaWeightNet, WeightNet
from iada.nn.characteristics import TrainingMemory
from iada.nn.class_covariance import ClassCovariance
from iada.nn.perturbation_net import PerturbationNet
from iada.nn.priors import class_balanced_weights
from iada.training.config import SINGLE_PROCESS, TrainerConfig
from iada.utils.checks import complain
from iada.utils.distributed import Group, broadcast
from iada.utils.loading import labels_of

Module = TypeVar("Module", bound=nn.Module)


def build_method(
    config: TrainerConfig,
    backbone: nn.Module,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    class_counts: Tensor,
    train_set: Dataset,
    group: Group = None,
) -> Method:
    """The method that `config` names.

    Args:
        backbone, head, optimizer, class_counts: as in `MetaIADA`.
        train_set: of which some methods need the labels, and AFR the inputs.
        group: of the processes that share each batch.
    """
    shared = (backbone, head, optimizer, class_counts)
    common: dict[str, Any] = {"clip_norm": config.clip_norm, "process_group": group}
    if config.method in ("metasaug", "meta-iada"):
        return _with_covariance(config, *shared, train_set, group)
    if config.method == "meta-weight-net":
        weight_net = _placed(WeightNet(), head, group)
        engine = _engine_settings(config)
        return MetaWeightNet(
            backbone,
            head,
            optimizer,
            weight_net=weight_net,
            weight_lr=config.perturbation_lr,
            **engine,
            **common,
        )
    if config.method in SINGLE_PROCESS:
        return _pasting(config, *shared, train_set, group)
    if config.method in ("cb-ce", "cb-focal"):
        gamma = config.focal_gamma if config.method == "cb-focal" else 0.0
        return ClassBalanced(*shared, class_beta=config.class_beta, focal_gamma=gamma, **common)
    if config.method == "ldam-drw":
        epoch = round(config.reweight_from * config.epochs)
        return LDAM(*shared, class_beta=config.class_beta, reweight_epoch=epoch, **common)
    covariance = _covariance(config, head) if config.method == "isda" else None
    beta = config.beta if config.method == "logit-adjustment" else 0.0
    return FirstOrder(*shared, covariance=covariance, alpha=config.alpha, beta=beta, **common)


def _with_covariance(
    config: TrainerConfig,
    backbone: nn.Module,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    class_counts: Tensor,
    train_set: Dataset,
    group: Group,
) -> MetaIADA:
    """Meta-IADA, or MetaSAug as a case of it.

    MetaSAug (Li et al., CVPR 2021) is the same iteration with ε = 0, β = 0 and class-balanced
    weights, its Σ the streamed one moved by Eq. 9 for one step alone, as in its published code.
    Its α there is λ t/T over the whole run: 0.8 λ to λ in the last 40 of 200 epochs.
    """
    own: dict[str, Any]
    if config.method == "metasaug":
        weights = class_balanced_weights(class_counts, config.class_beta)
        own = {"epsilon": 0.0, "beta": 0.0, "class_weights": weights, "persistent": False}
    else:
        own = {"beta": config.beta, "persistent": config.persistent}
        if config.perturbation == "constant":
            own["epsilon"] = config.epsilon
        else:
            network = PerturbationNet(
                hidden=config.perturbation_hidden,
                zero_init=config.perturbation_init == "zero",
            )
            network = _placed(network, head, group)
            adam = torch.optim.Adam(
                network.parameters(),
                lr=config.perturbation_lr,
                weight_decay=config.perturbation_weight_decay,
            )
            network.requires_grad_(config.perturbation == "learned")
            own |= {
                "perturbation": network,
                "perturbation_optimizer": adam,
                "log_proportion": config.log_proportion,
                "rate_free_perturbation": config.rate_free_perturbation,
            }
        own |= {"epsilon_scale": config.epsilon_scale, "epsilon_unit": config.epsilon_unit}
    memory = TrainingMemory(head.out_features, len(train_set))  # type: ignore[arg-type]
    return MetaIADA(
        backbone,
        head,
        optimizer,
        class_counts,
        covariance=_covariance(config, head),
        memory=_placed(memory, head),
        alpha=config.alpha,
        covariance_lr=config.covariance_lr,
        rate_free_covariance=config.rate_free_covariance,
        keep_semidefinite=config.keep_semidefinite,
        project=config.project,
        clip_norm=config.clip_norm,
        process_group=group,
        **_engine_settings(config),
        **own,
    )


def _pasting(
    config: TrainerConfig,
    backbone: nn.Module,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    class_counts: Tensor,
    train_set: Dataset,
    group: Group,
) -> CMO:
    """CMO or AFR."""
    if group is not None:
        remedy = "start one process, or take another method"
        raise complain("method", "one process for cmo and afr", "several", remedy)
    labels = labels_of(train_set)
    if labels is None:
        expected = f"an attribute `labels`, a tensor (N), for method {config.method!r}"
        raise complain("train_set", expected, "none", "add it to the data set")
    options: dict[str, Any] = {
        "labels": labels,
        "first_epoch": config.ce_epochs,
        "seed": config.seed,
        "clip_norm": config.clip_norm,
    }
    shared = (backbone, head, optimizer, class_counts)
    if config.method == "cmo":
        return CMO(*shared, last_epoch=config.epochs, **options)
    finetune_epoch = config.epochs - config.finetune_epochs
    return AFR(*shared, train_set=train_set, finetune_epoch=finetune_epoch, **options)


def _engine_settings(config: TrainerConfig) -> dict[str, Any]:
    names = ("hypergradient", "scope", "interval", "low_memory")
    return {name: getattr(config, name) for name in names}


def _covariance(config: TrainerConfig, head: nn.Linear) -> ClassCovariance:
    return _placed(ClassCovariance(head.out_features, head.in_features, config.structure), head)


def _placed(module: Module, head: nn.Linear, group: Group = None) -> Module:
    """On the head's device, in its precision or float32, and the same on every rank."""
    dtype = torch.promote_types(torch.float32, head.weight.dtype)
    module = module.to(head.weight.device, dtype)
    broadcast([*module.parameters(), *module.buffers()], group)
    return module
