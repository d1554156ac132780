"""Implicit adversarial data augmentation: the loss, its state, and Meta-IADA.

Zhou et al., "Boosting Model Resilience via Implicit Adversarial Data Augmentation", IJCAI 2024.
"""

from iada.meta.meta_iada import MetaIADA
from iada.meta.method import MetaStep, Method
from iada.methods.meta_iada import MetaIADAOptions
from iada.nn.characteristics import TrainingMemory, characteristics
from iada.nn.class_covariance import ClassCovariance
from iada.nn.divergence import check_divergence
from iada.nn.eager import eager_loss
from iada.nn.functional import fused_loss
from iada.nn.iada_loss import IADALoss
from iada.nn.perturbation_net import PerturbationNet
from iada.nn.priors import log_class_prior
from iada.nn.sharded_loss import ShardedIADALoss
from iada.training.config import TrainerConfig
from iada.training.label_issues import LabelIssues, SampleLog, label_issues
from iada.training.loggers import open_logger
from iada.training.trainer import Trainer
from iada.utils.checks import value_checks
from iada.utils.loading import Collated, TensorData
from iada.utils.loop_data import Indexed, endless
from iada_kernels.low_rank import LowRankCovariance
from iada_kernels.version import __version__

__all__ = [
    "ClassCovariance",
    "Collated",
    "IADALoss",
    "Indexed",
    "LabelIssues",
    "LowRankCovariance",
    "MetaIADA",
    "MetaIADAOptions",
    "MetaStep",
    "Method",
    "PerturbationNet",
    "SampleLog",
    "ShardedIADALoss",
    "TensorData",
    "Trainer",
    "TrainerConfig",
    "TrainingMemory",
    "__version__",
    "characteristics",
    "check_divergence",
    "eager_loss",
    "endless",
    "fused_loss",
    "label_issues",
    "log_class_prior",
    "open_logger",
    "value_checks",
]
