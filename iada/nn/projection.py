"""Covariances that stay positive semidefinite through Eq. 9, which as such may leave the cone."""

from collections.abc import Callable

import torch
from torch import Tensor

from iada_kernels.torch_ops.blocking import blocks
from iada_kernels.triangular import is_triangular, matrices, triangles


def nearest_positive_semidefinite(
    covariance: Tensor, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Σ with its negative eigenvalues at 0, and the number of classes that had any beyond rounding.

    covariance (C, A, A), symmetric, variances (C, A), or with this width A triangles or packed:
    then it is its diagonal that is clamped. A class without negative eigenvalues keeps its bits.
    """
    if covariance.dim() == 2:
        negative = covariance < 0
        if width is not None:
            negative[:, width:] = False
        return covariance.masked_fill(negative, 0.0), negative.any(dim=1).sum()
    if width is not None and is_triangular(covariance, width):
        return _by_matrices(nearest_positive_semidefinite, width, covariance)
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values.abs().amax(dim=1) * values.shape[1] * torch.finfo(values.dtype).eps
    negative = values[:, 0] < -rounding
    clamped = (vectors * values.clamp(min=0)[:, None, :]) @ vectors.mT
    return torch.where(negative[:, None, None], clamped, covariance), negative.sum()


def semidefinite_or_former(
    covariance: Tensor, former: Tensor, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Σ after a step; as before the step where that is indefinite beyond rounding; and how many.

    The step goes back whole for a class, and in the diagonal and the low-rank structure for each
    variance of the diagonal by itself: U Uᵀ is semidefinite whatever U is. Semidefinite is what a
    Cholesky factorization of Σ + A · rounding · trace goes through, so that no eigenvalues are
    needed and nothing waits for the device. NaN counts as indefinite.

    covariance, former: (C, A, A), symmetric, variances (C, A), or with this width A triangles or
    packed; former is semidefinite.
    Returns Σ and the number of classes that went back, ().
    """
    if covariance.dim() == 2:
        fine = covariance >= 0
        if width is not None:
            fine[:, width:] = covariance[:, width:].isfinite()
        return torch.where(fine, covariance, former), (~fine).any(dim=1).sum()
    if width is not None and is_triangular(covariance, width):
        return _by_matrices(semidefinite_or_former, width, covariance, former)
    kept, fine = _semidefinite_or_former(covariance, former)
    return kept, (~fine).sum()


def _by_matrices(
    step: Callable[..., tuple[Tensor, Tensor]], width: int, *covariances: Tensor
) -> tuple[Tensor, Tensor]:
    """`step` of triangles, some classes at a time: what it keeps, and what it counts."""
    kept = torch.empty_like(covariances[0])
    count = torch.zeros((), dtype=torch.int64, device=kept.device)
    for classes in blocks(len(kept), width * width):
        found, number = step(*(matrices(sigma[classes], width) for sigma in covariances))
        kept[classes] = triangles(found)
        count += number
    return kept, count


def _semidefinite_or_former(covariance: Tensor, former: Tensor) -> tuple[Tensor, Tensor]:
    """Of full Σ: and which classes, (C), did not go back."""
    limits = torch.finfo(covariance.dtype)
    trace = former.diagonal(dim1=1, dim2=2).sum(dim=1)
    rounding = trace * former.shape[1] * limits.eps + limits.tiny
    shifted = covariance.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(rounding[:, None])
    fine = torch.linalg.cholesky_ex(shifted).info == 0
    return torch.where(fine[:, None, None], covariance, former), fine


class SemidefiniteSteps:
    """Steps of full covariances in place that keep the cone, and factor a class rarely.

    What a Cholesky factorization allows, A · rounding · trace, a class may also move by without
    one: its eigenvalues move by at most the norms of the steps (Weyl), and a streaming update
    shrinks the negative ones. So a step is checked when the norms since the last check, or what
    rounding may have added to them, exceed that.
    """

    def __init__(self, unchecked: Tensor, held: Tensor) -> None:
        """Both are written.

        unchecked: (C), how far each class may have moved since it was last factored.
        held: (), how often a class's step was left out.
        """
        self.unchecked, self.held = unchecked, held

    def step(self, covariance: Tensor, bound: Tensor, move: Callable[[Tensor], None]) -> None:
        """`move` adds to covariance (C, A, A), on a CPU.

        bound: (C), at least the Frobenius norm of what each class's Σ moves by.
        """
        limits = torch.finfo(covariance.dtype)
        trace = covariance.diagonal(dim1=1, dim2=2).sum(dim=1)
        unchecked = self.unchecked.to(covariance.dtype)
        moved = unchecked + torch.where(bound == 0, 0.0, bound + limits.eps * trace)
        allowed = trace * (covariance.shape[1] * limits.eps)
        classes = (~(moved <= allowed) & (bound != 0)).nonzero()[:, 0]  # NaN is checked
        former = covariance[classes]
        move(covariance)
        if not len(classes):
            self.unchecked.copy_(moved)
            return
        kept, fine = _semidefinite_or_former(covariance[classes], former)
        covariance[classes] = kept
        moved[classes] = torch.where(fine, 0.0, unchecked[classes])
        self.unchecked.copy_(moved)
        self.held.add_((~fine).sum())
