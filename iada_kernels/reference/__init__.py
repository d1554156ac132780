"""The definitions of IADA in plain differentiable torch: the one oracle of every backend.

Nothing here is fast or frugal. Each function writes an equation of the paper (Zhou et al.,
IJCAI 2024) as directly as torch allows, follows the dtype of its inputs (use float64 to judge
others), and is differentiable by autograd to any order.
"""

from iada_kernels.reference.characteristics import batch_characteristics, same_label_fraction
from iada_kernels.reference.covariance import covariance_update, population_statistics
from iada_kernels.reference.hypergradient import directional_derivative, hypergradient
from iada_kernels.reference.loss import (
    adjusted_logits,
    iada_loss,
    perturbation_sign,
    quadratic_forms,
)

__all__ = [
    "adjusted_logits",
    "batch_characteristics",
    "covariance_update",
    "directional_derivative",
    "hypergradient",
    "iada_loss",
    "perturbation_sign",
    "population_statistics",
    "quadratic_forms",
    "same_label_fraction",
]
