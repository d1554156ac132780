"""The ways to compute a training step: loss, gradients and covariance update at one shape."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import iada
from bench.gpu.accuracy import ALPHA, BETA, State, loss_module, step
from bench.measuring.isda import ISDAEstimator
from bench.measuring.shapes import Problem, Shape

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
    "linear_cross_entropy": "torch's F.linear_cross_entropy, forward and backward",
    "liger": "Liger-Kernel's fused linear cross-entropy",
    "cut_cross_entropy": "Apple's cut-cross-entropy",
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
    return lambda: problem.cross_entropy(shape.ignore_index)


def floor_sides(shape: Shape, problem: Problem) -> tuple[dict[str, Side], dict[str, str]]:
    """Eq. 6 without ε, Σ and log π, and what computes just that; and why others do not compete.

    "triton" is `iada.fused_loss`. The others' operators are called as their projects document it.
    """
    leaves = (problem.features, problem.weight, problem.bias)
    ignored = shape.ignore_index

    def side(loss: Callable[..., Tensor]) -> Side:
        def call() -> tuple[Tensor, ...]:
            value = loss(*leaves, problem.labels)
            return (value, *torch.autograd.grad(value, leaves))

        return call

    def ours(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        terms = (features, weight, bias, labels)
        return iada.fused_loss(*terms, ignore_index=ignored, backend="triton")

    def by_torch() -> Callable[..., Tensor]:
        loss = F.linear_cross_entropy  # since torch 2.13
        return lambda h, w, b, y: loss(h, w, y, linear_bias=b, ignore_index=ignored)

    def by_liger() -> Callable[..., Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=ignored)
        return lambda h, w, b, y: loss(w, h, y, b)

    def by_cut() -> Callable[..., Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w, b, y: linear_cross_entropy(h, w, y, bias=b, ignore_index=ignored)

    sides = {"triton": side(ours), "cross_entropy": cross_entropy_side(shape, problem)}
    absent = {}
    others = {"linear_cross_entropy": by_torch, "liger": by_liger, "cut_cross_entropy": by_cut}
    for name, make in others.items():
        try:
            call = side(make())
            call()
            sides[name] = call
        except Exception as error:  # theirs: not installed, or not for this device or shape
            absent[name] = f"{type(error).__name__}: {error}"[:200]
    return sides, absent
