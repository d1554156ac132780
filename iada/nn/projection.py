"""The nearest positive semidefinite covariance."""

import torch
from torch import Tensor


def nearest_positive_semidefinite(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Σ with its negative eigenvalues at 0, and the number of classes that had any beyond rounding.

    covariance (C, A, A), symmetric, or variances (C, A). A class without negative eigenvalues
    keeps its bits.
    """
    if covariance.dim() == 2:
        return covariance.clamp(min=0), (covariance < 0).any(dim=1).sum()
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values.abs().amax(dim=1) * values.shape[1] * torch.finfo(values.dtype).eps
    negative = values[:, 0] < -rounding
    clamped = (vectors * values.clamp(min=0)[:, None, :]) @ vectors.mT
    return torch.where(negative[:, None, None], clamped, covariance), negative.sum()
