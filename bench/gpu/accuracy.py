"""Errors on a device, judged against torch's own at the same dtype, both against float64.

The sign of the perturbation legitimately differs where its argument g is within rounding of 0: rows
with such a coordinate get ε = 0, so that their sign is of no account, and ∂L/∂ε is compared on the
other rows. `reference` is the one oracle; it is asked in blocks of rows, for the sake of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import iada
from bench.measuring.shapes import Problem, Shape
from iada_kernels import reference
from iada_kernels.contract import LossInputs, LossOptions

ALPHA, BETA = 0.5, 1.0
ERROR_RATIO = 4  # different orders of summation
SIGN_MARGIN = 1e-5  # of the largest weight
BLOCK_BYTES = 2e9
GRADIENTS = ("features", "weight", "bias", "epsilon")


@dataclass(frozen=True)
class State:
    """What a `ClassCovariance` holds before the step."""

    covariance: Tensor
    mean: Tensor
    count: Tensor

    def load(self, module: iada.IADALoss) -> None:
        for name in ("covariance", "mean", "count"):
            getattr(module.covariance, name).copy_(getattr(self, name))


def make_state(shape: Shape, problem: Problem) -> State:
    generator = torch.Generator().manual_seed(7)
    mean = 0.1 * torch.randn(shape.classes, shape.features, generator=generator)
    count = torch.randint(0, 50, (shape.classes,), generator=generator)
    device = problem.weight.device
    return State(problem.covariance.detach().clone(), mean.to(device), count.to(device))


def loss_module(shape: Shape, problem: Problem, state: State, backend: str) -> iada.IADALoss:
    """Loss and streaming update in one call, as people use them, with a state of its own."""
    module = iada.IADALoss(
        shape.classes,
        shape.features,
        structure=shape.structure,
        alpha=ALPHA,
        beta=BETA,
        ignore_index=shape.ignore_index,
        backend=backend,
    ).to(problem.weight.device)
    module.log_prior = problem.log_prior
    state.load(module)
    return module


def step(loss: Callable[..., Tensor], problem: Problem) -> tuple[Tensor, ...]:
    """The loss and the gradients of `problem.differentiable`."""
    value = loss(problem.features, problem.weight, problem.bias, problem.labels, problem.epsilon)
    return (value, *torch.autograd.grad(value, problem.differentiable))


def outcome(module: iada.IADALoss, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a step computed, by name, detached from what later steps overwrite."""
    found = dict(zip(("loss", *GRADIENTS), results, strict=True))
    state = module.covariance
    found |= {"covariance": state.covariance, "mean": state.mean, "count": state.count}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def with_sure_signs(shape: Shape, problem: Problem) -> tuple[Problem, Tensor]:
    """The problem with ε = 0 where a sign is uncertain, and the rows where it is not."""
    with torch.no_grad():
        features, weight, bias = (t.double() for t in problem.differentiable[:3])
        target = _target(shape, problem)[:, None]
        logits = torch.addmm(bias, features, weight.T)
        others = logits.scatter(1, target, -torch.inf).softmax(dim=1)
        argument = others.scatter(1, target, -1.0) @ weight
        sure = argument.abs().amin(dim=1) > SIGN_MARGIN * weight.abs().max()
        epsilon = torch.where(sure, problem.epsilon, 0.0)
    return replace(problem, epsilon=epsilon.requires_grad_()), sure


def exact(shape: Shape, problem: Problem, state: State) -> tuple[dict[str, Tensor], float]:
    """The step in float64 by the definitions: first the update, then the loss with the new Σ.

    And the largest |z̃|, at least 1.
    """
    counts = problem.labels != shape.ignore_index
    labels = torch.where(counts, problem.labels, -1)
    with torch.no_grad():
        covariance, mean, count = reference.covariance_update(
            state.covariance.double(),
            state.mean.double(),
            state.count,
            problem.features.double(),
            labels,
        )
    leaves = [t.detach().double().requires_grad_() for t in problem.differentiable]
    features, weight, bias, epsilon = leaves
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    value, largest = weight.new_zeros(()), 1.0
    count_of_rows = counts.sum().clamp(min=1)
    options = LossOptions(ALPHA, BETA, shape.ignore_index, "sum")
    width, pairs = shape.features, 5 * shape.classes * shape.features
    row_bytes = 8 * (pairs + (2 * width * width if shape.structure == "full" else 0))
    for rows in torch.arange(shape.samples).split(max(1, int(BLOCK_BYTES // row_bytes))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        inputs = LossInputs(
            features=features[part],
            weight=weight,
            bias=bias,
            labels=problem.labels[part],
            covariance=covariance,
            epsilon=epsilon[part],
            log_prior=problem.log_prior.double(),
        )
        loss = reference.iada_loss(inputs, options) / count_of_rows
        for total, grad in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            total += grad
        value = value + loss.detach()
        with torch.no_grad():
            inputs = inputs._replace(labels=_target(shape, problem)[part])
            largest = max(largest, _largest(reference.adjusted_logits(inputs, options)))
    found = dict(zip(("loss", *GRADIENTS), (value, *grads), strict=True))
    state_after = {"covariance": covariance, "mean": mean, "count": count}
    return found | state_after, largest


def judged(
    ours: dict[str, Tensor],
    torch_way: dict[str, Tensor],
    want: dict[str, Tensor],
    sure: Tensor,
    largest_logit: float,
) -> dict[str, dict[str, float | bool]]:
    """Of each tensor: our error and torch's in the max norm, and whether ours is within bounds.

    Torch may be exact by luck, so the unit is no less than what rounding explains: of the result,
    and of logits of size |z̃|, which moves every probability by a share eps·|z̃|.
    """
    found: dict[str, dict[str, float | bool]] = {}
    for name, expected in want.items():
        have, other = ours[name], torch_way[name]
        if name == "epsilon":
            have, other, expected = have[sure], other[sure], expected[sure]
        if name == "count":
            found[name] = {"within": torch.equal(have, expected)}
            continue
        error, torch_error = (_largest(t.double() - expected) for t in (have, other))
        scale = max(_largest(expected), 1.0 if name == "loss" else 1e-3)
        eps = torch.finfo(have.dtype).eps
        if name in ("loss", *GRADIENTS):
            eps = max(eps, torch.finfo(torch.float32).eps * largest_logit)
        unit = max(torch_error, eps * scale)
        found[name] = {
            "error": error,
            "torch_error": torch_error,
            "largest": _largest(expected),
            "within": error <= ERROR_RATIO * unit,  # False for NaN
        }
    return found


def _target(shape: Shape, problem: Problem) -> Tensor:
    return problem.labels.masked_fill(problem.labels == shape.ignore_index, 0)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
