"""One batch taken in by Σ_c = diag(d_c) + U_c U_cᵀ, and truncated to its rank again.

What streams on is an exact sum of columns: with m centred rows X of the class, of weight w, and the
shift s of its mean,

    (1−w) Σ + (w/m) XᵀX + w(1−w) s sᵀ = diag((1−w) d) + B Bᵀ
    B = [√(1−w) U,  √(w/m) Xᵀ,  √(w(1−w)) s]                          (A, r + m + 1)

For any orthogonal Q, B Bᵀ = (BQ)(BQ)ᵀ. With Q the eigenvectors of the Gram matrix BᵀB, the r
leading columns of BQ are the new U. Of the others' sum the diagonal goes to d, the rest is dropped.
So the diagonal of Σ stays exact, and with F the (weighted) sum of all that ever left U, a positive
semidefinite matrix whose diagonal is d,

    Σ − (diag(d) + U Uᵀ) = F − diag(F) ,    entries at most √(d_a d_b) ,    norm at most Σ_a d_a .
"""

import torch
from torch import Tensor

from iada_kernels.low_rank import LowRankCovariance, unpacked
from iada_kernels.torch_ops.low_rank import counts_classes

MOST_ROWS = 256  # of a class (on accelerators: of the batch) that are taken in at a time
MOST_SCRATCH = 2**24  # elements of what is made for several classes at once on accelerators
ITERATIONS = 6  # of the subspace, where no eigenvectors can be had without waiting


def low_rank_update(
    covariance: Tensor, centred: Tensor, labels: Tensor, size: Tensor, w: Tensor, shift: Tensor
) -> None:
    """In place on the packed Σ (C, (1 + r) A); classes without rows keep their bits.

    centred: rows less the mean of their class in the batch, (N, A). labels: (N), C for rows that
    are left out. size: rows of each class, (C + 1). w: (C, 1). shift: of the means, (C, A).
    """
    if counts_classes(labels):
        _update_grouped(covariance, centred, labels, size, w, shift)
    else:
        _update_masked(covariance, centred, labels, size, w, shift)


def _update_grouped(
    covariance: Tensor, centred: Tensor, labels: Tensor, size: Tensor, w: Tensor, shift: Tensor
) -> None:
    """Class by class, with the eigenvectors of the smaller of BᵀB and BBᵀ."""
    state = unpacked(covariance, shift.shape[1])
    rank = state.factors.shape[2]
    groups = centred[labels.argsort(stable=True)].split(size.tolist())
    for c, (weight, group) in enumerate(zip(w[:, 0].tolist(), groups[:-1], strict=True)):
        if not len(group):
            continue
        diagonal, factors = state.diagonal[c], state.factors[c].mT  # U_cᵀ (r, A)
        diagonal *= 1 - weight
        parts = (group * (weight / len(group)) ** 0.5).split(max(MOST_ROWS, rank))
        columns = [factors * (1 - weight) ** 0.5, shift[c : c + 1] * (weight * (1 - weight)) ** 0.5]
        for part in parts:
            rows = _eigen_rows(torch.cat([*columns, part]).double()).to(state.factors.dtype)
            dropped = max(0, len(rows) - rank)
            diagonal += rows[:dropped].square().sum(dim=0)
            factors[: len(rows) - dropped] = rows[dropped:].flip(0)
            factors[len(rows) - dropped :] = 0
            columns = [factors]


def _eigen_rows(rows: Tensor) -> Tensor:
    """Eigenvectors of rowsᵀ rows times the roots of the eigenvalues, ascending: (min(k, A), A)."""
    count, width = rows.shape
    if count <= width:
        return torch.linalg.eigh(rows @ rows.T).eigenvectors.T @ rows
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors.T * values.clamp_(min=0).sqrt_()[:, None]


def _update_masked(
    covariance: Tensor, centred: Tensor, labels: Tensor, size: Tensor, w: Tensor, shift: Tensor
) -> None:
    """The same with shapes that do not depend on the labels, and nothing that waits.

    The leading columns are those of a subspace iteration, to rounding orthogonal: what they
    miss of the best ones goes to d like all else. Of each class's Gram matrix the part of the
    batch's rows is the one of all rows, masked, so that no class has a copy of them.
    """
    state = unpacked(covariance, shift.shape[1])
    share = (w / size[:-1, None].clamp(min=1)).sqrt()
    state.diagonal.mul_(1 - w)
    old, between = (1 - w).sqrt(), (w * (1 - w)).sqrt() * shift
    for rows in range(0, len(labels), MOST_ROWS):
        part = slice(rows, rows + MOST_ROWS)
        _absorb(state, centred[part], labels[part], share, old, between)
        old, between = torch.ones_like(old), torch.zeros_like(between)


def _absorb(
    state: LowRankCovariance,
    centred: Tensor,
    labels: Tensor,
    share: Tensor,
    old: Tensor,
    between: Tensor,
) -> None:
    """Columns old · U, `between` and share · (the rows of the class), truncated, for all classes.

    share, old: (C, 1). between: (C, A).
    """
    (num_classes, width), rank = between.shape, state.factors.shape[2]
    gram_of_rows = centred @ centred.T
    step = max(1, MOST_SCRATCH // max(rank * width, (rank + 1 + len(labels)) ** 2))
    every = torch.arange(num_classes, device=labels.device)
    for start in range(0, num_classes, step):
        place = slice(start, start + step)
        factors = state.factors[place].mT
        own = torch.cat([old[place, :, None] * factors, between[place, None]], dim=1)
        mask = (labels == every[place, None]).to(centred.dtype) * share[place]
        cross = (own @ centred.T) * mask[:, None]
        inner = gram_of_rows * mask[:, :, None] * mask[:, None, :]
        upper = torch.cat([own @ own.mT, cross], dim=2)
        gram = torch.cat([upper, torch.cat([cross.mT, inner], dim=2)], dim=1)
        basis = _leading_basis(gram, rank).mT
        leading = basis[:, :, : rank + 1] @ own
        of_rows = (basis[:, :, rank + 1 :] * mask[:, None]).flatten(0, 1)
        leading += (of_rows @ centred).view_as(leading)
        everything = own.square().sum(dim=1) + mask.square() @ centred.square()
        dropped = everything - leading.square().sum(dim=1)
        present = share[place] > 0
        state.diagonal[place] += torch.where(present, dropped.clamp_(min=0), 0.0)
        state.factors[place] = torch.where(present[:, :, None], leading, factors).mT


def _leading_basis(gram: Tensor, rank: int) -> Tensor:
    """About the `rank` leading eigenvectors of (n, k, k), as columns of norm 1 or less."""
    size = gram.shape[1]
    scale = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    gram = gram / scale.clamp(min=torch.finfo(gram.dtype).tiny)
    row = torch.arange(1, size + 1, device=gram.device, dtype=gram.dtype)
    # A start in general position: any would do, and this one draws no random numbers.
    basis = torch.cos(row[:, None] * row[:rank] * 2**0.5).expand(len(gram), -1, -1)
    for _ in range(ITERATIONS):
        basis = _orthonormal(_orthonormal(gram @ basis))
    return basis


def _orthonormal(basis: Tensor) -> Tensor:
    """Columns of (n, k, r) by Cholesky, shifted, so that columns of rank below r do no harm."""
    square = basis.mT @ basis
    diagonal = square.diagonal(dim1=1, dim2=2)
    limits = torch.finfo(basis.dtype)
    diagonal += diagonal.sum(dim=1, keepdim=True) * (2 * limits.eps) + limits.tiny
    factor = torch.linalg.cholesky_ex(square).L
    return torch.linalg.solve_triangular(factor, basis.mT, upper=False).mT
