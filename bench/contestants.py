"""The ways to compute a training step: loss, gradients and covariance update at one shape."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import iada
from bench.accuracy import ALPHA, BETA, State, loss_module, step
from bench.isda import ISDAEstimator
from bench.shapes import Problem, Shape

Side = Callable[[], tuple[Tensor, ...]]

# What a contestant is, for the reader of the JSON.
MEANING = {
    "triton": "loss, gradients and update by the Triton kernels",
    "triton_loss": "the same without the update",
    "torch": "loss, gradients and update by the torch closed forms",
    "torch_compiled": "torch.compile of these",
    "eager": "eager_loss and the estimator of the ISDA code",
    "eager_compiled": "torch.compile of these",
    "cross_entropy": "plain cross_entropy(linear), forward and backward: the floor",
}


def fused_side(
    shape: Shape, problem: Problem, state: State, backend: str, compiler: str | None = None
) -> Side:
    loss: Callable[..., Tensor] = loss_module(shape, problem, state, backend)
    if compiler:
        loss = torch.compile(loss, backend=compiler, dynamic=False)
    return lambda: step(loss, problem)


def loss_side(shape: Shape, problem: Problem, backend: str) -> Side:
    def call() -> tuple[Tensor, ...]:
        value = iada.fused_loss(
            **problem.tensors(),
            alpha=ALPHA,
            beta=BETA,
            ignore_index=shape.ignore_index,
            backend=backend,
        )
        return (value, *torch.autograd.grad(value, problem.differentiable))

    return call


def eager_side(shape: Shape, problem: Problem, compiler: str | None = None) -> Side:
    estimator = ISDAEstimator(
        shape.classes, shape.features, shape.structure == "full", problem.weight.device
    )

    def forward(
        features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, epsilon: Tensor
    ) -> Tensor:
        with torch.no_grad():
            estimator.update(features.detach(), labels)
        return iada.eager_loss(
            features,
            weight,
            bias,
            labels,
            covariance=estimator.covariance,
            epsilon=epsilon,
            log_prior=problem.log_prior,
            alpha=ALPHA,
            beta=BETA,
        )

    called = torch.compile(forward, backend=compiler, dynamic=False) if compiler else forward

    def call() -> tuple[Tensor, ...]:
        value = called(
            problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon
        )
        return (value, *torch.autograd.grad(value, problem.differentiable))

    return call


def why_not_eager(shape: Shape, free: float) -> str:
    """Why the eager side is not tried, or nothing. Its backward keeps the temporaries as well."""
    if shape.ignore_index >= 0:
        return "the estimator of the ISDA code knows no ignored labels"
    if 4 * shape.eager_bytes > free:
        return f"its temporaries take {shape.eager_bytes / 1e9:.0f} GB and more"
    return ""


def cross_entropy_side(shape: Shape, problem: Problem) -> Side:
    leaves = (problem.features, problem.weight, problem.bias)

    def call() -> tuple[Tensor, ...]:
        logits = F.linear(*leaves)
        value = F.cross_entropy(logits, problem.labels, ignore_index=shape.ignore_index)
        return (value, *torch.autograd.grad(value, leaves))

    return call
