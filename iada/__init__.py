"""Implicit adversarial data augmentation: the loss, its state, and Meta-IADA.

Zhou et al., "Boosting Model Resilience via Implicit Adversarial Data Augmentation", IJCAI 2024.
"""

from iada.covariance import ClassCovariance
from iada.eager import eager_loss
from iada.loss import IADALoss, fused_loss
from iada.prior import log_class_prior
from iada.validation import value_checks

__all__ = [
    "ClassCovariance",
    "IADALoss",
    "eager_loss",
    "fused_loss",
    "log_class_prior",
    "value_checks",
]
