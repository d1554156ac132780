"""Class statistics: what the stream has to equal, and one step of the stream.

Population convention (division by n), all history weighted equally.
"""

import torch
from torch import Tensor

from iada_kernels.low_rank import LowRankCovariance, is_low_rank, unpacked
from iada_kernels.triangular import is_triangular, matrices, triangles


def population_statistics(
    features: Tensor, labels: Tensor, num_classes: int, diagonal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance (C, A, A) or (C, A), mean (C, A) and count (C) of each class, in one pass."""
    width = features.shape[1]
    shape = (num_classes, width) if diagonal else (num_classes, width, width)
    covariance = features.new_zeros(shape)
    mean = features.new_zeros(num_classes, width)
    count = torch.zeros(num_classes, dtype=torch.int64, device=features.device)
    for c in range(num_classes):
        rows = features[labels == c]
        count[c] = len(rows)
        if len(rows):
            mean[c] = rows.mean(dim=0)
            spread = rows - mean[c]
            covariance[c] = (
                (spread * spread).mean(dim=0) if diagonal else spread.T @ spread / len(rows)
            )
    return covariance, mean, count


def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of the stream, out of place: (covariance, mean, count) after `features`.

    Σ ← (1−w) Σ + w Σ′ + w(1−w)(μ−μ′)(μ−μ′)ᵀ;  μ ← μ + w(μ′−μ);  n ← n+m;  w = m/(n+m).
    A packed Σ (C, (1 + r) A) is then truncated to rank r beside its diagonal.
    """
    if is_low_rank(covariance, mean.shape[1]):
        return _low_rank_update(covariance, mean, count, features, labels)
    if is_triangular(covariance, mean.shape[1]):
        full = matrices(covariance, mean.shape[1])
        updated, new_mean, new_count = covariance_update(full, mean, count, features, labels)
        return triangles(updated), new_mean, new_count
    diagonal = covariance.dim() == 2
    batch_covariance, batch_mean, batch_count = population_statistics(
        features, labels, mean.shape[0], diagonal
    )
    w = batch_count.to(mean.dtype) / (count + batch_count).clamp(min=1)
    shift = mean - batch_mean
    w_mean = w[:, None]
    if diagonal:
        w_cov, between = w_mean, shift * shift
    else:
        w_cov, between = w[:, None, None], shift[:, :, None] * shift[:, None, :]
    updated = (1 - w_cov) * covariance + w_cov * batch_covariance + w_cov * (1 - w_cov) * between
    return updated, mean + w_mean * (batch_mean - mean), count + batch_count


def _low_rank_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of diag(d) + U Uᵀ: d scales by 1−w, and U Uᵀ streams on as a full covariance does.

    Of what that gives U keeps the r leading eigenvectors, times the roots of their eigenvalues; the
    diagonal of all others goes to d. So the diagonal of Σ is that of the full covariance, and of
    the others' sum F the loss sees diag(F) = d.
    """
    diagonal, factors = unpacked(covariance, mean.shape[1])
    rank, full = factors.shape[2], factors @ factors.mT
    full, new_mean, new_count = covariance_update(full, mean, count, features, labels)
    values, vectors = torch.linalg.eigh(full)
    scaled = vectors * values.clamp(min=0).sqrt()[:, None, :]
    least, zeros = max(0, mean.shape[1] - rank), max(0, rank - mean.shape[1])
    w = (new_count - count).to(mean.dtype) / new_count.clamp(min=1)
    dropped = scaled[:, :, :least].square().sum(dim=2)
    leading = torch.nn.functional.pad(scaled[:, :, least:].flip(2), (0, zeros))
    updated = LowRankCovariance((1 - w)[:, None] * diagonal + dropped, leading).packed()
    updated = torch.where((w > 0)[:, None], updated, covariance)
    return updated, new_mean, new_count
