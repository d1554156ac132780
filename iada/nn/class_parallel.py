"""Sums over ranks that each hold a block of the classes, and the forms of Eq. 6 made of them.

Every rank differentiates the loss of the whole batch, and `Sum` adds up their gradients, so that
each rank's graph carries them times the number of ranks until `Entry` divides.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iada.nn.class_covariance import ClassCovariance
from iada.utils.distributed import GroupReference, size_of
from iada_kernels.torch_ops.quadratic import class_table, class_table_backward


class Rows(NamedTuple):
    """The rows of the batch beside the classes of a rank."""

    own: Tensor  # (N) bool, whether the label is one of them
    place: Tensor  # (N) its place among them, 0 for others
    group: GroupReference

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks; differentiable."""
        return Sum.apply(tensor, self.group)

    def of_labels(self, values: Tensor) -> Tensor:
        """values[y] of the rank that has class y, (N, A) of (c, A)."""
        if len(values):
            own = values[self.place].masked_fill(~self.own[:, None], 0.0)
        else:  # a graph of the same sums on every rank
            own = values.new_zeros(len(self.own), values.shape[1]) + values.sum()
        return self.sum(own)

    def label_logit(self, logits: Tensor) -> Tensor:
        """z_y, (N) of (N, c)."""
        return self.sum(logits.masked_fill(~self.label_mask(logits), 0.0).sum(dim=1))

    def without_label(self, logits: Tensor) -> Tensor:
        """(N, c) with −∞ for y."""
        return logits.masked_fill(self.label_mask(logits), -torch.inf)

    def label_mask(self, logits: Tensor) -> Tensor:
        """Where the column is the row's label, (N, c)."""
        columns = torch.arange(logits.shape[1], device=logits.device)
        return self.own[:, None] & (columns == self.place[:, None])


class Sum(torch.autograd.Function):
    """Over the ranks. torch.distributed's own hold the group for as long as the graph lives."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: GroupReference) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        if group() is not None:
            dist.all_reduce(total, group=group())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(grad, ctx.group), None


class Entry(torch.autograd.Function):
    """What enters this rank's graph: by `is_shared` what all ranks have alike, or what it owns."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: GroupReference, is_shared: bool) -> Tensor:
        ctx.group, ctx.is_shared = group, is_shared
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = Sum.apply(grad, ctx.group) if ctx.is_shared else grad
        return total / size_of(ctx.group()), None, None


def diagonal_form(
    weight: Tensor, label_weight: Tensor, sigma: Tensor, num_classes: int, rows: Rows
) -> Tensor:
    """R[y, j] for the own classes j, (N, c), the square expanded about the mean of all W.

    weight and sigma (c, A) are those of the own classes, label_weight (N, A) has w_y.
    """
    sigma = rows.of_labels(sigma.to(weight.dtype))
    mean = rows.sum(weight.detach().sum(dim=0)) / num_classes
    weight, label_weight = weight - mean, label_weight - mean
    cross = sigma * label_weight
    squares = sigma @ (weight * weight).T - 2 * (cross @ weight.T)
    table = 0.5 * (squares + torch.linalg.vecdot(cross, label_weight)[:, None])
    return table.masked_fill(rows.label_mask(table), 0.0)


def table_form(
    weight: Tensor, owner: ClassCovariance, classes: range, num_classes: int, rows: Rows
) -> Tensor:
    """R[y, j] for the own `classes` j, (N, c), with Σ in any structure.

    Rows are made by the ranks of y, columns go to those of j.
    """
    start, stop = classes.start, classes.stop
    head = rows.sum(nn.functional.pad(weight, (0, 0, start, num_classes - stop)))
    # The own classes first, as Σ has them.
    table = _ClassTable.apply(head.roll(-start, 0), rows.place, owner).roll(start, 1)
    table = table.masked_fill(~rows.own[:, None], 0.0)
    return rows.sum(table)[:, start:stop]


class _ClassTable(torch.autograd.Function):
    """R[y_i, ·] of rows whose classes Σ has, (N, C); Σ is lent, and has no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, classes: Tensor, owner: ClassCovariance) -> Tensor:
        ctx.save_for_backward(weight, classes)
        if ctx.needs_input_grad[0]:
            ctx.lent = owner.lend(owner.covariance)
        listed = _listed(classes, owner.covariance)
        table = class_table(weight, owner.covariance, listed)
        return table if listed is classes else table[classes]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, classes = ctx.saved_tensors
        sigma, grad_weight = ctx.lent.read(), torch.zeros_like(weight)
        listed = _listed(classes, sigma)
        if listed is not classes:
            grad = grad.new_zeros(len(sigma), len(weight)).index_add_(0, classes, grad)
        class_table_backward(weight, sigma, listed, None, grad, grad_weight, False)
        ctx.lent.awaited = False
        return grad_weight, None, None


def _listed(classes: Tensor, sigma: Tensor) -> Tensor:
    """The classes of the table's rows: those of the samples, or each once where these are fewer."""
    if len(classes) < len(sigma):
        return classes
    return torch.arange(len(sigma), device=classes.device)


def log_sum_exp(logits: Tensor, rows: Rows) -> Tensor:
    """Over the columns of all ranks, (N), of which some are finite."""
    none = logits.new_full((len(logits), 1), -torch.inf)
    largest = torch.cat([logits.detach(), none], dim=1).amax(dim=1)
    if rows.group() is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=rows.group())
    return largest + rows.sum((logits - largest[:, None]).exp().sum(dim=1)).log()


@torch.no_grad()
def perturbation_sign(logits: Tensor, weight: Tensor, label_weight: Tensor, rows: Rows) -> Tensor:
    """s of Eq. 6, sign(Σ_{j≠y} r_j w_j − w_y), (N, A): r sums to 1 over the classes but y."""
    others = rows.without_label(logits)
    ratios = (others - log_sum_exp(others, rows)[:, None]).exp()
    return (rows.sum(ratios @ weight) - label_weight).sign_()
