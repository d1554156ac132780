"""Covariances between diagonal and full: Σ_c = diag(d_c) + U_c U_cᵀ, with r columns in U_c.

Kernels, buffers and checkpoints hold them packed, as one tensor (C, (1 + r) A): for each class d_c
and then the r columns of U_c, one after the other. Rank 0 is the diagonal structure itself. A
packed tensor is told from variances (C, A) by its width, from matrices (C, A, A) by its axes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels.triangular import diagonals, is_triangular, matrices


class LowRankCovariance(NamedTuple):
    """Σ_c = diag(d_c) + U_c U_cᵀ of each class, as people pass it to `iada.fused_loss`.

    Examples:
        >>> sigma = iada.LowRankCovariance(torch.ones(2, 3), torch.ones(2, 3, 1))
        >>> sigma.dense()[0]
        tensor([[2., 1., 1.],
                [1., 2., 1.],
                [1., 1., 2.]])

    Attributes:
        diagonal: d, (C, A), not negative, in squared units of the features.
        factors: U, (C, A, r), in units of the features.
    """

    diagonal: Tensor
    factors: Tensor

    def packed(self) -> Tensor:
        """As kernels take it, (C, (1 + r) A); a copy, through which gradients flow."""
        return torch.cat([self.diagonal[:, None], self.factors.mT], dim=1).flatten(1)

    def dense(self) -> Tensor:
        """Σ, (C, A, A)."""
        return torch.diag_embed(self.diagonal) + self.factors @ self.factors.mT

    def variances(self) -> Tensor:
        """The diagonal of Σ, (C, A)."""
        return self.diagonal + self.factors.square().sum(dim=2)


def is_low_rank(covariance: Tensor, width: int) -> bool:
    """Whether Σ is packed with at least one factor, for features of this width A."""
    return covariance.dim() == 2 and covariance.shape[1] > width


def unpacked(covariance: Tensor, width: int) -> LowRankCovariance:
    """Views of a packed Σ (C, (1 + r) A)."""
    parts = covariance.unflatten(1, (-1, width))
    return LowRankCovariance(parts[:, 0], parts[:, 1:].mT)


def variances(covariance: Tensor, width: int) -> Tensor:
    """The diagonal of Σ in any structure, (C, A)."""
    if is_triangular(covariance, width):
        return diagonals(covariance, width)
    if covariance.dim() == 3:
        return covariance.diagonal(dim1=1, dim2=2)
    return unpacked(covariance, width).variances() if is_low_rank(covariance, width) else covariance


def unfolded(covariance: Tensor, width: int) -> Tensor:
    """Σ (C, A, A) for a packed one or triangles, and any other as it is."""
    if is_triangular(covariance, width):
        return matrices(covariance, width)
    return unpacked(covariance, width).dense() if is_low_rank(covariance, width) else covariance


def difference_norm(
    covariance: LowRankCovariance, former: LowRankCovariance
) -> tuple[Tensor, Tensor]:
    """‖Σ − Σ'‖ and ‖Σ'‖ over all classes, (): from Gram matrices of r columns, not cancelling."""
    diagonal, factors = former
    total, change = covariance.factors + factors, covariance.factors - factors
    moved = _square_norm(covariance.diagonal - diagonal, total, change)
    return moved.clamp(min=0).sqrt(), _square_norm(diagonal, factors, factors).sqrt()


def _square_norm(diagonal: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_c ‖diag(d) + ½ (L Rᵀ + R Lᵀ)‖², (); d (C, A), L and R (C, A, r)."""
    mixed = left.mT @ right
    square = ((left.mT @ left) * (right.mT @ right) + mixed * mixed.mT).sum() / 2
    return square + (diagonal * (diagonal + 2 * (left * right).sum(dim=2))).sum()
