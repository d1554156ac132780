"""The class table R of a diagonal Σ (C, A), and its adjoint; see `quadratic`.

The diagonal form expands the square, because only then is it a matrix product. Differences of rows
do not change when W is centred; without centring, a common offset of the rows would cancel.
"""

import torch
from torch import Tensor


def diagonal_table(weight: Tensor, covariance: Tensor, classes: Tensor | None) -> Tensor:
    weight = weight - weight.mean(dim=0)
    w_label, sigma = _label_rows(weight, covariance, classes)
    cross = sigma * w_label
    squares = sigma @ (weight * weight).T - 2 * (cross @ weight.T)
    table = 0.5 * (squares + torch.linalg.vecdot(cross, w_label)[:, None])
    if classes is None:
        return table - torch.diag(table.diagonal())  # ρ_y = 0, exactly
    return table.scatter(1, classes[:, None], 0.0)


def diagonal_table_and_tangent(
    weight: Tensor, weight_tangent: Tensor, covariance: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    weight_tangent = weight_tangent - weight_tangent.mean(dim=0)
    table = diagonal_table(weight, covariance, classes)
    weight = weight - weight.mean(dim=0)
    w_label, sigma = _label_rows(weight, covariance, classes)
    v_label = weight_tangent if classes is None else weight_tangent[classes]
    tangent = sigma @ (weight * weight_tangent).T - (sigma * w_label) @ weight_tangent.T
    tangent -= (sigma * v_label) @ weight.T
    tangent += torch.linalg.vecdot(sigma * w_label, v_label)[:, None]
    if classes is None:
        return table, tangent - torch.diag(tangent.diagonal())
    return table, tangent.scatter(1, classes[:, None], 0.0)


def diagonal_backward(
    weight: Tensor,
    covariance: Tensor,
    classes: Tensor | None,
    grad_table: Tensor,
    grad_weight: Tensor | None,
    needs_covariance: bool,
) -> Tensor | None:
    # Row sums of G times w_c² are written out: they are 0 for the loss, but not for every G.
    weight = weight - weight.mean(dim=0)
    w_label, sigma = _label_rows(weight, covariance, classes)
    total = grad_table.sum(dim=1, keepdim=True)
    mixed = grad_table @ weight
    if grad_weight is not None:
        grad_weight += weight * (grad_table.T @ sigma) - grad_table.T @ (sigma * w_label)
        label_rows = sigma * (total * w_label - mixed)
        if classes is None:
            grad_weight += label_rows
        else:
            grad_weight.index_add_(0, classes, label_rows)
    if not needs_covariance:
        return None
    grad_rows = 0.5 * (grad_table @ (weight * weight) + w_label * (total * w_label - 2 * mixed))
    if classes is None:
        return grad_rows
    return torch.zeros_like(weight).index_add_(0, classes, grad_rows)


def _label_rows(
    weight: Tensor, covariance: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    covariance = covariance.to(weight.dtype)
    if classes is None:
        return weight, covariance
    return weight[classes], covariance[classes]
