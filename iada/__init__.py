"""Implicit adversarial data augmentation: the loss, its state, and Meta-IADA.

Zhou et al., "Boosting Model Resilience via Implicit Adversarial Data Augmentation", IJCAI 2024.
"""

from iada.covariance import ClassCovariance
from iada.eager import eager_loss
from iada.engine.meta import MetaIADA
from iada.engine.meta_step import MetaStep
from iada.loss import IADALoss, fused_loss
from iada.perturbation import PerturbationNet
from iada.prior import log_class_prior
from iada.sample_characteristics import TrainingMemory, characteristics
from iada.training.config import TrainerConfig
from iada.training.data import TensorData
from iada.training.trainer import Trainer
from iada.validation import value_checks

__all__ = [
    "ClassCovariance",
    "IADALoss",
    "MetaIADA",
    "MetaStep",
    "PerturbationNet",
    "TensorData",
    "Trainer",
    "TrainerConfig",
    "TrainingMemory",
    "characteristics",
    "eager_loss",
    "fused_loss",
    "log_class_prior",
    "value_checks",
]
