"""The class table R of quadratic forms, and its adjoint.

    R[u, j] = ½ (w_j − w_c)ᵀ Σ_c (w_j − w_c)          c the class of row u

ρ of Eq. 6 depends on a sample only through its class, so that one table of U rows serves all N
samples. Rows are either all the classes (classes=None) or a list of class indices, which may
repeat. Given G = ∂L/∂R,

    ∂L/∂W   = Σ_u [ diag(G_u)(W − 1w_c) Σ_c − e_c (G_uᵀ (W − 1w_c) Σ_c) ]
    ∂L/∂Σ_c = ½ Σ_u (W − 1w_c)ᵀ diag(G_u) (W − 1w_c)

Shapes: weight (C, A), covariance (C, A, A), its triangles, (C, A) or packed, classes (U), R and G
(U, C). Scratch is bounded by a few blocks, whatever the shape. Here are the choice of the structure
and the full one; `diagonal` and `low_rank` have the others.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from iada_kernels.low_rank import is_low_rank, unfolded
from iada_kernels.torch_ops import low_rank
from iada_kernels.torch_ops.blocking import BLOCK_ELEMENTS, blocks, is_one_block, join
from iada_kernels.torch_ops.diagonal import (
    diagonal_backward,
    diagonal_table,
    diagonal_table_and_tangent,
)
from iada_kernels.triangular import is_triangular, times_off_diagonal, triangles

FEW_ROWS = 32  # up to here a second product costs less than a transposed copy of a large Σ


def class_table(weight: Tensor, covariance: Tensor, classes: Tensor | None = None) -> Tensor:
    """R (U, C), differentiable by autograd, in the dtype of `weight`."""
    if is_low_rank(covariance, weight.shape[1]):
        return low_rank.class_table(weight, covariance, classes)
    if covariance.dim() == 2:
        return diagonal_table(weight, covariance, classes)
    tables = []
    for delta, sigma, _ in _full_blocks(weight, covariance, classes):
        tables.append(torch.linalg.vecdot(delta @ sigma, delta) * 0.5)
    return join(tables)


def class_table_and_product(
    weight: Tensor, covariance: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """R and, where that is small, what spares ∂L/∂W a product, else None.

    Of a full Σ it is 2 (W − 1w_c) Σ_c (U, C, A); of a low-rank one the projections on U_c.
    """
    if is_low_rank(covariance, weight.shape[1]):
        return low_rank.class_table_and_projections(weight, covariance, classes)
    rows = len(weight) if classes is None else len(classes)
    if covariance.dim() == 2 or not is_one_block(rows, weight.numel()):
        return class_table(weight, covariance, classes), None
    tables, products = [], []
    for delta, sigma, _ in _full_blocks(weight, covariance, classes):
        products.append(_twice_product(delta, sigma))
        tables.append(torch.linalg.vecdot(products[-1], delta) * 0.25)
    return join(tables), join(products)


def class_table_and_tangent(
    weight: Tensor, weight_tangent: Tensor, covariance: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """R and its derivative along V, Ṙ[u, j] = (w_j − w_c)ᵀ Σ_c (V_j − V_c), (U, C) each."""
    if is_low_rank(covariance, weight.shape[1]):
        return low_rank.class_table_and_tangent(weight, weight_tangent, covariance, classes)
    if covariance.dim() == 2:
        return diagonal_table_and_tangent(weight, weight_tangent, covariance, classes)
    tables, tangents = [], []
    for delta, sigma, rows in _full_blocks(weight, covariance, classes):
        product = _twice_product(delta, sigma)
        tables.append(torch.linalg.vecdot(product, delta) * 0.25)
        delta_tangent = differences(weight_tangent, rows if classes is None else classes[rows])
        tangents.append(torch.linalg.vecdot(product, delta_tangent) * 0.5)
    return join(tables), join(tangents)


def differences(matrix: Tensor, index: Tensor | slice) -> Tensor:
    """m_j − m_u for the rows u that `index` names: (U, C, A) of a matrix (C, A)."""
    return matrix[None, :, :] - matrix[index][:, None, :]


def class_table_backward(
    weight: Tensor,
    covariance: Tensor,
    classes: Tensor | None,
    product: Tensor | None,
    grad_table: Tensor,
    grad_weight: Tensor | None,
    needs_covariance: bool,
) -> Tensor | None:
    """Add ∂L/∂W to `grad_weight` in place (None: not needed) and return ∂L/∂Σ if needed.

    `product` is what `class_table_and_product` gave. ∂L/∂Σ is in the dtype of `weight`.
    """
    if is_low_rank(covariance, weight.shape[1]):
        return low_rank.class_table_backward(
            weight, covariance, classes, product, grad_table, grad_weight, needs_covariance
        )
    if covariance.dim() == 2:
        return diagonal_backward(
            weight, covariance, classes, grad_table, grad_weight, needs_covariance
        )
    if grad_weight is not None and product is not None:
        _add_product(grad_weight, classes, slice(None), product, grad_table)
        grad_weight = None
    grad_covariance = weight.new_zeros(covariance.shape) if needs_covariance else None
    if grad_weight is None and grad_covariance is None:
        return None
    triangular = is_triangular(covariance, weight.shape[1])
    for delta, sigma, rows in _full_blocks(weight, covariance, classes):
        if grad_weight is not None:
            product = _twice_product(delta, sigma)
            _add_product(grad_weight, classes, rows, product, grad_table[rows])
        if grad_covariance is not None:
            scaled = delta * (0.5 * grad_table[rows, :, None])
            if classes is None and not triangular:
                torch.bmm(scaled.mT, delta, out=grad_covariance[rows])
                continue
            grad = scaled.mT @ delta
            if triangular:
                grad = times_off_diagonal(triangles(grad), weight.shape[1], 2.0)
            if classes is None:
                grad_covariance[rows] = grad
            else:
                grad_covariance.index_add_(0, classes[rows], grad)
    return grad_covariance


def _full_blocks(
    weight: Tensor, covariance: Tensor, classes: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield (W − 1w_c, Σ_c, rows) for one block of rows at a time: (u, C, A), (u, A, A), slice."""
    num_classes, width = weight.shape
    count = num_classes if classes is None else len(classes)
    copies_sigma = classes is not None or num_classes > FEW_ROWS or covariance.dtype != weight.dtype
    copies_sigma = copies_sigma or is_triangular(covariance, width)
    for rows in blocks(count, width * (max(width, num_classes) if copies_sigma else num_classes)):
        index = rows if classes is None else classes[rows]
        sigma = unfolded(covariance[index].to(weight.dtype), width)
        yield differences(weight, index), sigma, rows


def _twice_product(rows: Tensor, sigma: Tensor) -> Tensor:
    """rows (Σ + Σᵀ): a quadratic form sees the symmetric part only, so must its derivative."""
    if rows.shape[1] <= FEW_ROWS and sigma.numel() > BLOCK_ELEMENTS:
        return (rows @ sigma).add_(rows @ sigma.mT)
    return rows @ (sigma + sigma.mT)


def _add_product(
    grad_weight: Tensor,
    classes: Tensor | None,
    rows: slice,
    twice_product: Tensor,
    grad_table: Tensor,
) -> None:
    """Both terms of ∂L/∂W from 2 (W − 1w_c) Σ_c (u, C, A) and G (u, C)."""
    scaled = twice_product * (0.5 * grad_table[:, :, None])
    grad_weight += scaled.sum(dim=0)
    if classes is None:
        grad_weight[rows] -= scaled.sum(dim=1)
    else:
        grad_weight.index_add_(0, classes[rows], scaled.sum(dim=1), alpha=-1)
