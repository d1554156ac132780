"""The eigenvalues of each class's covariance, and how many directions they amount to."""

import torch
from torch import Tensor

from iada.nn.class_covariance import ClassCovariance
from iada.utils.checks import argument_error, check_covariance, check_float, check_tensor


@torch.no_grad()
def spectrum(covariance: Tensor | ClassCovariance) -> Tensor:
    """Eigenvalues of Σ_c in squared units of the features, descending: (C, A) float64 on the CPU.

    covariance: (C, A, A), of which the symmetric part counts, or variances (C, A), or a
    `ClassCovariance` of any structure. A negative eigenvalue is what a step of Eq. 9 can leave; it
    is shown as it is.
    """
    if isinstance(covariance, ClassCovariance):
        compact = covariance.structure in ("low-rank", "triangle")
        covariance = covariance.dense() if compact else covariance.covariance
    check_tensor("covariance", covariance, "a tensor (C, A, A) or (C, A)")
    if covariance.dim() not in (2, 3):
        got = f"shape {tuple(covariance.shape)}"
        raise argument_error("covariance", "(C, A, A) or (C, A)", got, "pass one matrix a class")
    check_covariance(covariance, *covariance.shape[:2])
    if covariance.dim() == 2:
        return covariance.double().sort(dim=1, descending=True).values.cpu()
    rows = []
    for sigma in covariance:  # one class at a time: float64 copies of all may not fit
        sigma = sigma.double()
        rows.append(torch.linalg.eigvalsh((sigma + sigma.mT) / 2).flip(0).cpu())
    return torch.stack(rows)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues' shares, (C): 1 for one direction, A for a sphere.

    Of eigenvalues (C, A), negative ones taken as 0; 0 for a class without any variance.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    check_float("eigenvalues", eigenvalues, "a floating-point tensor (C, A)", (None, None))
    positive = eigenvalues.double().clamp(min=0)
    total = positive.sum(dim=1)
    share = positive / torch.where(total > 0, total, 1.0)[:, None]
    entropy = -torch.special.xlogy(share, share).sum(dim=1)
    return torch.where(total > 0, entropy.exp(), 0.0)
