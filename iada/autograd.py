"""The IADA loss as an autograd Function over a backend of `iada_kernels`."""

from typing import Any

import torch
from torch import Tensor

from iada_kernels import closed_form
from iada_kernels.contract import Backend, LossInputs, LossNeeds, LossOptions


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
    ) -> Tensor:
        inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)
        needs = LossNeeds(*ctx.needs_input_grad[:6])
        loss, ctx.saved = backend.loss_forward(inputs, options, needs)
        ctx.save_for_backward(features, weight, bias, covariance, epsilon, log_prior, labels)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, labels = ctx.saved_tensors
        needs = LossNeeds(*ctx.needs_input_grad[:6])
        if torch.is_grad_enabled():
            return (*_backward_with_graph(ctx, tensors, labels, grad_loss), None, None, None)
        features, weight, bias, covariance, epsilon, log_prior = tensors
        inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)
        grads = ctx.backend.loss_backward(inputs, ctx.options, ctx.saved, grad_loss, needs)
        found = (
            grads.features,
            grads.weight,
            grads.bias,
            grads.covariance,
            grads.epsilon,
            grads.log_prior,
        )
        cast = [
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(found, tensors, strict=True)
        ]
        return (*cast, None, None, None)


def _backward_with_graph(
    ctx: Any, tensors: list[Tensor | None], labels: Tensor, grad_loss: Tensor
) -> list[Tensor | None]:
    # Views give each argument an identity of its own, should one tensor stand for two.
    views = [None if t is None else t.view_as(t) for t in tensors]
    features, weight, bias, covariance, epsilon, log_prior = views
    inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)  # type: ignore[arg-type]
    with torch.autocast(grad_loss.device.type, enabled=False):
        loss = closed_form.loss_differentiable(inputs, ctx.options)
    wanted = [i for i in range(len(views)) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(
        loss,
        [views[i] for i in wanted],  # type: ignore[misc]
        grad_loss,
        create_graph=True,
        allow_unused=True,
    )
    grads: list[Tensor | None] = [None] * len(views)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads
