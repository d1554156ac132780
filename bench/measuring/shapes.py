"""The reference shapes, and random problems of these shapes."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iada_kernels.contract import LossInputs
from iada_kernels.low_rank import LowRankCovariance

IGNORED = 255
EAGER_LIMIT = 3e9  # bytes of temporaries beyond which the eager form is not tried


@dataclass(frozen=True)
class Shape:
    """N samples, C classes, A features, the structure of Σ; labels: how they are drawn."""

    name: str
    samples: int
    classes: int
    features: int
    structure: str
    labels: str = "long-tail"
    rank: int = 0  # of a low-rank Σ

    @property
    def eager_bytes(self) -> float:
        """Temporaries of the eager form in float32: differences, Σ of each sample, N×C×C."""
        n, c, a = self.samples, self.classes, self.features
        return 4.0 * n * (3 * c * a + (a * a + c * c if self.structure == "full" else a))

    @property
    def ignore_index(self) -> int:
        return IGNORED if self.labels == "skewed" else -100

    def __str__(self) -> str:
        return f"{self.name} ({self.samples}, {self.classes}, {self.features}, {self.structure})"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cifar10-r32", 128, 10, 64, "full"),
        Shape("cifar100-r32", 128, 100, 64, "full"),
        Shape("cifar10-wrn", 128, 10, 640, "full"),
        Shape("cifar100-wrn", 128, 100, 640, "full"),
        Shape("subpop-r50", 64, 2, 2048, "full", "90:10"),
        Shape("civil-bert", 16, 2, 768, "full", "90:10"),
        Shape("imagenet-diag", 256, 1000, 2048, "diag"),
        Shape("inat-diag", 512, 8142, 2048, "diag"),
        Shape("dense", 131072, 19, 256, "full", "skewed"),
    )
}


@dataclass(frozen=True)
class Problem:
    """Tensors of Eq. 6 in float32; features, weight, bias and epsilon require gradients."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    covariance: Any  # Tensor, or LowRankCovariance for the loss alone
    epsilon: Tensor
    log_prior: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self.features, self.weight, self.bias, self.epsilon

    def to(self, device: torch.device) -> "Problem":
        """The same numbers on `device`, as leaves of their own."""
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            copy = tensor.detach().to(device, copy=True)
            moved[field.name] = copy.requires_grad_(tensor.requires_grad)
        return Problem(**moved)

    def loss_inputs(self) -> LossInputs:
        """The tensors, detached, as the backends take them."""
        return LossInputs(**{name: tensor.detach() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Any]:
        """By the names that `iada.fused_loss` has for them."""
        return dict(vars(self))

    def gradients(self, loss: Callable[..., Tensor], **options: Any) -> tuple[Tensor, ...]:
        """Forward and backward: what a step of `loss` computes for the differentiable tensors."""
        value = loss(**self.tensors(), ignore_index=IGNORED, **options)
        return torch.autograd.grad(value, self.differentiable)

    def cross_entropy(self, ignore_index: int = -100) -> tuple[Tensor, ...]:
        """Plain cross_entropy(linear), forward and backward: the loss and its gradients."""
        leaves = (self.features, self.weight, self.bias)
        value = F.cross_entropy(F.linear(*leaves), self.labels, ignore_index=ignore_index)
        return (value, *torch.autograd.grad(value, leaves))


def class_shares(shape: Shape) -> Tensor:
    """The share of each class (C), not normalised."""
    c = shape.classes
    if shape.labels == "90:10":
        return torch.tensor([0.9, 0.1])
    if shape.labels == "skewed":
        return 1 / torch.arange(1, c + 1)
    return 0.01 ** (torch.arange(c) / max(1, c - 1))


def draw_labels(shape: Shape, generator: torch.Generator) -> Tensor:
    """Labels (N) as skewed as the data they stand for, some of them ignored where they are."""
    n = shape.samples
    labels = torch.multinomial(class_shares(shape), n, replacement=True, generator=generator)
    if shape.labels == "skewed":
        labels[torch.rand(n, generator=generator) < 0.05] = IGNORED
    return labels


def make_problem(shape: Shape, seed: int = 0) -> Problem:
    """Random tensors of this shape, never zeros; labels as skewed as the data they stand for."""
    generator = torch.Generator().manual_seed(seed)
    n, c, a = shape.samples, shape.classes, shape.features

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    share = class_shares(shape)
    labels = draw_labels(shape, generator)
    covariance: Tensor | LowRankCovariance
    if shape.structure == "low-rank":
        factors = normal(c, a, shape.rank) / a**0.5
        covariance = LowRankCovariance(torch.rand(c, a, generator=generator), factors)
    elif shape.structure == "diag":
        covariance = torch.rand(c, a, generator=generator)
    else:
        covariance = torch.empty(c, a, a)
        for sigma in covariance:  # low-rank plus diagonal, one class at a time to bound memory
            factor = normal(a, 8) / a**0.5
            sigma.copy_(factor @ factor.T).diagonal().add_(0.5)
    return Problem(
        normal(n, a).requires_grad_(),
        (normal(c, a) / a**0.5).requires_grad_(),
        normal(c).requires_grad_(),
        labels,
        covariance,
        (2 * torch.rand(n, generator=generator) - 1).requires_grad_(),
        share.div(share.sum()).log(),
    )
