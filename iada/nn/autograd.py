"""The IADA loss as an autograd Function over a backend of `iada_kernels`."""

from typing import Any

import torch
from torch import Tensor

from iada.utils.autocast import full_precision
from iada_kernels import closed_form
from iada_kernels.contract import (
    Backend,
    ClassStatistics,
    LossInputs,
    LossNeeds,
    LossOptions,
)


class IADALossFunction(torch.autograd.Function):
    """Forward and backward by the backend; double backward by the torch closed forms.

    A first-order backward uses what the forward pass saved. With create_graph=True the loss is
    built again from the inputs as an ordinary graph, which autograd differentiates to any order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        covariance: Tensor | None,
        epsilon: Tensor | None,
        log_prior: Tensor | None,
        labels: Tensor,
        options: LossOptions,
        backend: Backend,
        stream: ClassStatistics | None,
    ) -> Tensor:
        inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)
        needs = LossNeeds(*ctx.needs_input_grad[:6])
        loss, ctx.saved = backend.loss_forward(inputs, options, needs, stream)
        ctx.save_for_backward(features, weight, bias, covariance, epsilon, log_prior, labels)
        ctx.options, ctx.needs, ctx.backend = options, needs, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad_loss.device):  # backward may be called under autocast
            if torch.is_grad_enabled():
                return (*_backward_with_graph(ctx, grad_loss), None, None, None, None)
            features, weight, bias, covariance, epsilon, log_prior, labels = ctx.saved_tensors
            inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)
            grads = ctx.backend.loss_backward(inputs, ctx.options, ctx.saved, grad_loss, ctx.needs)
        return (
            _cast(grads.features, features),
            _cast(grads.weight, weight),
            _cast(grads.bias, bias),
            _cast(grads.covariance, covariance),
            _cast(grads.epsilon, epsilon),
            _cast(grads.log_prior, log_prior),
            *(None, None, None, None),
        )


def _cast(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    if grad is None or tensor is None or grad.dtype == tensor.dtype:
        return grad
    return grad.to(tensor.dtype)


def _backward_with_graph(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    *tensors, labels = ctx.saved_tensors
    # Views give each argument an identity of its own, should one tensor stand for two.
    views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    loss = closed_form.loss_differentiable(_loss_inputs(views, labels), ctx.options)
    asked = [
        view if needed else None for view, needed in zip(views, ctx.needs_input_grad, strict=False)
    ]
    wanted = [view for view in asked if view is not None]
    found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True, allow_unused=True))
    return [None if view is None else next(found) for view in asked]


def _loss_inputs(tensors: list[Tensor | None], labels: Tensor) -> LossInputs:
    features, weight, bias, covariance, epsilon, log_prior = tensors
    assert features is not None
    assert weight is not None
    return LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)
