"""The class table R of Σ_c = diag(d_c) + U_c U_cᵀ, and its adjoint; see `quadratic`.

With the projections q_uj = U_cᵀ (w_j − w_c), r numbers for each row u and class j,

    R[u, j]  = (that of d) + ½ ‖q_uj‖²          Ṙ[u, j] = (that of d) + q_uj · U_cᵀ (V_j − V_c)
    ∂L/∂w_j  = (through d) + Σ_u U_c S_uj       S_uj = G_uj q_uj ;  S_uc = −Σ_j G_uj q_uj
    ∂L/∂U_c  = Σ_j w_j S_ujᵀ

so that all is in products of W, (C, A), and U_c, (A, r), for the classes that are present, and
nothing is as large as U·C·A.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from iada_kernels.low_rank import unpacked
from iada_kernels.torch_ops.blocking import blocks, join
from iada_kernels.torch_ops.diagonal import (
    diagonal_backward,
    diagonal_table,
    diagonal_table_and_tangent,
)

MOST_PROJECTIONS = 2**24  # 64 MiB of float32: up to here kept for the backward pass


def class_table(weight: Tensor, covariance: Tensor, classes: Tensor | None) -> Tensor:
    """R (U, C), differentiable by autograd."""
    return _table(weight, covariance, *distinct(classes), kept=None)


def class_table_and_projections(
    weight: Tensor, covariance: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """R and, where they are small, the projections of the distinct classes."""
    unique, place = distinct(classes)
    count = len(weight) if unique is None else len(unique)
    rank = covariance.shape[1] // weight.shape[1] - 1
    if count * rank * len(weight) > MOST_PROJECTIONS:
        return _table(weight, covariance, unique, place, kept=None), None
    kept: list[Tensor] = []
    table = _table(weight, covariance, unique, place, kept)
    return table, join(kept)


def class_table_and_tangent(
    weight: Tensor, weight_tangent: Tensor, covariance: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """R and Ṙ, (U, C) each."""
    unique, place = distinct(classes)
    diagonal = unpacked(covariance, weight.shape[1]).diagonal
    table, tangent = diagonal_table_and_tangent(weight, weight_tangent, diagonal, unique)
    moved = centred(weight), centred(weight_tangent)
    for factors, label, rows in factor_blocks(weight, covariance, unique):
        q, q_tangent = (projections(matrix, factors, label) for matrix in moved)
        table[rows] += 0.5 * q.square().sum(dim=1)
        tangent[rows] += (q * q_tangent).sum(dim=1)
    return _at(table, place), _at(tangent, place)


def class_table_backward(
    weight: Tensor,
    covariance: Tensor,
    classes: Tensor | None,
    kept: Tensor | None,
    grad_table: Tensor,
    grad_weight: Tensor | None,
    needs_covariance: bool,
) -> Tensor | None:
    """Add ∂L/∂W to `grad_weight` in place (None: not needed); return that by the packed Σ or None.

    `kept` is what `class_table_and_projections` gave.
    """
    unique, place = distinct(classes)
    if unique is not None and place is not None:
        zero = grad_table.new_zeros(len(unique), len(weight))
        grad_table = zero.index_add_(0, place, grad_table)
    diagonal = unpacked(covariance, weight.shape[1]).diagonal
    grad_diagonal = diagonal_backward(
        weight, diagonal, unique, grad_table, grad_weight, needs_covariance
    )
    grad = weight.new_zeros(covariance.shape) if needs_covariance else None
    if grad is not None and grad_diagonal is not None:
        unpacked(grad, weight.shape[1]).diagonal.copy_(grad_diagonal)
    matrix = centred(weight)
    for factors, label, rows in factor_blocks(weight, covariance, unique):
        q = projections(matrix, factors, label) if kept is None else kept[rows]
        slopes = at_differences(q * grad_table[rows, None], label)
        if grad_weight is not None:
            grad_weight.addmm_(slopes.T, factors.flatten(0, 1))
        if grad is not None:
            add_to_factors(grad, unique, rows, slopes @ matrix)
    return grad


def class_sums(
    classes: Tensor, residual: Tensor, curvature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (U, C) over the rows of each class: of classes that repeat, all but the first get 0.

    So that a step of Σ in place reads each U_c before it writes it.
    """
    unique, place = distinct(classes)
    assert unique is not None
    if place is None:
        order = torch.arange(len(classes), device=classes.device)
        first = order.new_zeros(int(residual.shape[1]))
        place = first.scatter_reduce_(0, classes, order, "amin", include_self=False)[classes]
    zero = residual.new_zeros(len(unique), residual.shape[1])
    return unique, zero.index_add(0, place, residual), zero.index_add(0, place, curvature)


def covariance_step(
    step: Tensor,
    covariance: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    classes: Tensor | None,
    residual: Tensor,
    curvature: Tensor,
    scale: float,
) -> None:
    """Add scale · ∂L̇/∂U to the packed `step` in place, which may be the packed Σ itself.

    ∂L̇/∂U_c = Σ_j [(w_j − w_c) (D q̇ + c q)ᵀ + (V_j − V_c) (D q)ᵀ], with the sums of `hypergradient`.
    """
    weight, weight_tangent = centred(weight), centred(weight_tangent)
    for factors, label, rows in factor_blocks(weight, covariance, classes):
        q = projections(weight, factors, label)
        q_tangent = projections(weight_tangent, factors, label)
        slopes = q * residual[rows, None]
        grad = at_differences(slopes, label) @ weight_tangent
        q_tangent.mul_(residual[rows, None]).addcmul_(q, curvature[rows, None])
        grad.addmm_(at_differences(q_tangent, label), weight)
        add_to_factors(step, classes, rows, grad, scale)


def distinct(classes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The distinct classes and each row's place among them, where the host may know; else as is."""
    if classes is None or not counts_classes(classes):
        return classes, None
    return torch.unique(classes, return_inverse=True)


def counts_classes(labels: Tensor) -> bool:
    """Whether their number may decide on shapes: not on accelerators, nor while being compiled."""
    return labels.is_cpu and not torch.compiler.is_compiling()


def centred(matrix: Tensor) -> Tensor:
    """Rows (C, A) less their mean, which differences of rows do not see."""
    return matrix - matrix.mean(dim=0)


def factor_blocks(
    weight: Tensor, covariance: Tensor, classes: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield (U_cᵀ (u, r, A) in the dtype of weight, the classes c (u), rows) a block at a time."""
    count = len(weight) if classes is None else len(classes)
    factors = unpacked(covariance, weight.shape[1]).factors.mT
    for rows in blocks(count, factors.shape[1] * max(weight.shape)):
        label = classes[rows] if classes is not None else None
        if label is None:
            label = torch.arange(count, device=weight.device)[rows]
        own = factors[rows] if classes is None else factors[label]
        yield own.to(weight.dtype), label, rows


def projections(matrix: Tensor, factors: Tensor, label: Tensor) -> Tensor:
    """U_cᵀ (m_j − m_c), (u, r, C), for centred rows m (C, A); 0 at the label."""
    products = (factors.flatten(0, 1) @ matrix.T).unflatten(0, factors.shape[:2])
    return products - products.gather(2, _column(label, products))


def at_differences(slopes: Tensor, label: Tensor) -> Tensor:
    """From slopes (u, r, C) by m_j − m_c those by m_j, (u·r, C); changes its argument."""
    total = slopes.sum(dim=2, keepdim=True)
    return slopes.scatter_add_(2, _column(label, slopes), -total).flatten(0, 1)


def add_to_factors(
    grad: Tensor, classes: Tensor | None, rows: slice, values: Tensor, scale: float = 1.0
) -> None:
    """Add scale · values (u·r, A), by columns of U, to a packed tensor in place."""
    width = values.shape[1]
    part = grad.unflatten(1, (-1, width))[:, 1:]
    values = values.unflatten(0, (-1, part.shape[1])).to(grad.dtype)
    if classes is None:
        part[rows].add_(values, alpha=scale)
    else:
        part.index_add_(0, classes[rows], values, alpha=scale)


def _table(
    weight: Tensor,
    covariance: Tensor,
    classes: Tensor | None,
    place: Tensor | None,
    kept: list[Tensor] | None,
) -> Tensor:
    forms, matrix = [], centred(weight)
    for factors, label, _ in factor_blocks(weight, covariance, classes):
        q = projections(matrix, factors, label)
        forms.append(0.5 * q.square().sum(dim=1))
        if kept is not None:
            kept.append(q)
    diagonal = unpacked(covariance, weight.shape[1]).diagonal
    return _at(diagonal_table(weight, diagonal, classes) + join(forms), place)


def _at(table: Tensor, place: Tensor | None) -> Tensor:
    return table if place is None else table[place]


def _column(label: Tensor, like: Tensor) -> Tensor:
    """The label's column as an index into (u, r, C)."""
    return label[:, None, None].expand(-1, like.shape[1], 1)
