"""The IADA loss as an autograd Function over a backend of `iada_kernels`."""

from typing import Any

import torch
from torch import Tensor

from iada.nn.class_covariance import ClassCovariance
from iada.utils.autocast import full_precision
from iada_kernels import torch_ops
from iada_kernels.contract import Backend, ClassStatistics, LossInputs, LossNeeds, LossOptions

OTHERS = 4  # arguments of `apply` before the tensors
LABELS = 3  # their place among the tensors of `LossInputs`; the others have gradients
COVARIANCE = 4


def lender(owner: ClassCovariance | None) -> ClassCovariance | None:
    """None where there is no backward, and under torch.compile, which makes no change in place.

    Nor of a shrunk Σ, which is the loss's own.
    """
    if owner is None or owner.shrinkage or not torch.is_grad_enabled():
        return None
    return None if torch.compiler.is_compiling() else owner


class IADALossFunction(torch.autograd.Function):
    """Forward and backward by the backend; double backward by torch operators.

    A Σ that a `ClassCovariance` owns is lent: it may stream on before the backward.

    A first-order backward uses what the forward pass saved. With create_graph=True the loss is
    built again from the inputs as an ordinary graph, which autograd differentiates to any order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: LossOptions,
        backend: Backend,
        stream: ClassStatistics | None,
        owner: ClassCovariance | None,
        *tensors: Any,
    ) -> Tensor:
        """`tensors` are those of `LossInputs`, in its order."""
        flags = ctx.needs_input_grad
        needs = LossNeeds(*flags[OTHERS : OTHERS + LABELS], *flags[OTHERS + LABELS + 1 :])
        loss, saved = backend.loss_forward(LossInputs(*tensors), options, needs, stream)
        ctx.lent = None
        if owner is not None and not needs.covariance:
            ctx.lent = owner.lend(tensors[COVARIANCE])
            tensors = (*tensors[:COVARIANCE], None, *tensors[COVARIANCE + 1 :])
        # Through autograd, which lets go of them with the graph, (N, C) tables among them.
        kept: list[Tensor] = []
        ctx.saved = _taken_apart(saved, kept)
        ctx.save_for_backward(*tensors, *kept)
        ctx.options, ctx.needs, ctx.backend = options, needs, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad_loss.device):  # backward may be called under autocast
            if torch.is_grad_enabled():
                return (*(None,) * OTHERS, *_backward_with_graph(ctx, grad_loss))
            inputs, kept = _saved(ctx)
            saved = _put_together(ctx.saved, kept)
            results = ctx.backend.loss_backward(inputs, ctx.options, saved, grad_loss, ctx.needs)
            if ctx.lent is not None:
                ctx.lent.awaited = False
        grads = results.tensors()
        grads.insert(LABELS, None)
        cast = [
            grad if grad is None or tensor is None or grad.dtype is tensor.dtype
            else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, inputs, strict=True)
        ]  # fmt: skip
        return (*(None,) * OTHERS, *cast)


def _saved(ctx: Any) -> tuple[LossInputs, list[Tensor]]:
    """The inputs, with Σ as it was, and what the forward pass kept beside them."""
    tensors = list(ctx.saved_tensors)
    if ctx.lent is not None:
        tensors[COVARIANCE] = ctx.lent.read()
    count = len(LossInputs._fields)
    return LossInputs(*tensors[:count]), tensors[count:]


def _taken_apart(record: Any, tensors: list[Tensor]) -> Any:
    """A backend's record with its tensors moved to `tensors`, and their places in their stead."""
    if isinstance(record, Tensor):
        tensors.append(record)
        return len(tensors) - 1
    if isinstance(record, list):
        return [_taken_apart(part, tensors) for part in record]
    if isinstance(record, tuple):  # a NamedTuple of tensors, None and such
        return type(record), [_taken_apart(part, tensors) for part in record]
    return record


def _put_together(record: Any, tensors: list[Tensor]) -> Any:
    """The inverse. Backends read what they kept as they left it, contiguous; hooks of autograd's,
    which may hold it elsewhere meanwhile, give back its numbers in any layout."""
    if isinstance(record, int):
        return tensors[record].contiguous()
    if isinstance(record, tuple):
        kind, parts = record
        return kind(*(_put_together(part, tensors) for part in parts))
    if isinstance(record, list):
        return [_put_together(part, tensors) for part in record]
    return record


def _backward_with_graph(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    inputs, _ = _saved(ctx)
    if ctx.lent is not None:  # it may stream on before the graph is used
        inputs = inputs._replace(covariance=ctx.lent.read().clone())
    # Views give each argument an identity of its own, should one tensor stand for two.
    views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    loss = torch_ops.loss_differentiable(LossInputs(*views), ctx.options)
    flags = ctx.needs_input_grad[OTHERS:]
    leaves = [view if needed else None for view, needed in zip(views, flags, strict=True)]
    present = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(loss, present, grad_loss, create_graph=True, allow_unused=True)
    remaining = iter(grads)
    return [None if leaf is None else next(remaining) for leaf in leaves]
