"""Full covariances without what symmetry repeats: the lower triangle of each Σ_c, half the memory.

LAPACK's rectangular full packed form (Gustavson, Waśniewski, Dongarra and Langou, ACM TOMS 37(2),
2010): the first k = ⌈A/2⌉ columns of the triangle, and in the corner above them, transposed, that
of the other rows and columns:

    A even: (C, A + 1, A/2)      A odd: (C, A, (A + 1)/2)

It is told from matrices (C, A, A) by its last axis; with A = 1 both are the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def triangular_shape(width: int) -> tuple[int, int]:
    """Of one class, for A = `width`."""
    return width + 1 - width % 2, (width + 1) // 2


def is_triangular(covariance: Tensor, width: int) -> bool:
    """Whether Σ is held so, for features of this width A."""
    return covariance.dim() == 3 and covariance.shape[2] != width


def _parts(covariance: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views (C, A, k), whose i ≥ j count, and (C, A − k, A − k), whose i ≤ j count."""
    rest = width // 2
    if width % 2:
        return covariance, covariance[:, :rest, 1:]
    return covariance[:, 1:], covariance[:, :rest]


def matrices(covariance: Tensor, width: int) -> Tensor:
    """Σ (C, A, A) of its triangles; differentiable."""
    first, rest = _parts(covariance, width)
    last = F.pad(rest.triu().mT, (0, 0, width - rest.shape[1], 0))
    lower = torch.cat([first.tril(), last], dim=2)
    return lower + lower.tril(-1).mT


def triangles(covariance: Tensor) -> Tensor:
    """The lower triangles of Σ (C, A, A), as they are held; a copy."""
    width = covariance.shape[2]
    half, odd = (width + 1) // 2, width % 2
    first = covariance[:, :, :half].tril()
    rest = covariance[:, half:, half:].mT.triu()
    rows, _ = triangular_shape(width)
    below = rows - rest.shape[1]
    return F.pad(first, (0, 0, 1 - odd, 0)) + F.pad(rest, (odd, 0, 0, below))


def diagonals(covariance: Tensor, width: int) -> Tensor:
    """The variances (C, A) of triangles."""
    parts = _parts(covariance, width)
    return torch.cat([part.diagonal(dim1=1, dim2=2) for part in parts], dim=1)


def times_off_diagonal(covariance: Tensor, width: int, factor: float) -> Tensor:
    """Triangles with all but their diagonals times `factor`; a copy.

    Each number off the diagonal stands for two of Σ: its derivative is twice that of one of them.
    """
    result = covariance * factor
    parts = zip(_parts(result, width), _parts(covariance, width), strict=True)
    for ours, given in parts:
        ours.diagonal(dim1=1, dim2=2).copy_(given.diagonal(dim1=1, dim2=2))
    return result
