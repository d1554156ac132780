"""The strengths ε of a batch: learned by the perturbation network Ω, or one number for all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iada.meta.learner import Rows, linear
from iada.nn.characteristics import PROPORTION, TrainingMemory, characteristics
from iada.nn.perturbation_net import PerturbationNet


class LearnedStrengths:
    """ε(f, Ω), and Ω's optimizer.

    Args:
        perturbation, optimizer: Ω, and by what it learns.
        log_prior: log π, (C), a part of f.
        scaler: a GradScaler, enabled or not.
        log_proportion: log π_y in place of π_y among the characteristics.
    """

    def __init__(
        self,
        perturbation: PerturbationNet,
        optimizer: torch.optim.Optimizer,
        log_prior: Tensor,
        scaler: torch.amp.GradScaler,
        log_proportion: bool = False,
    ) -> None:
        self.perturbation, self.optimizer = perturbation, optimizer
        self.log_prior, self.scaler = log_prior, scaler
        self.log_proportion = log_proportion

    @torch.no_grad()
    def traits(
        self, features: Tensor, head: nn.Linear, rows: Rows, memory: TrainingMemory
    ) -> Tensor:
        """The characteristics f of the whole batch, (N, 15); the memory takes it in."""
        logits = linear(features, head.weight, head.bias)
        traits = characteristics(
            features, logits, rows.labels, head.weight, self.log_prior, memory, rows.index
        )
        memory.record(traits[:, 0], traits[:, 1], rows.labels, rows.index)
        if self.log_proportion:
            traits[:, PROPORTION] = self.log_prior[rows.labels].to(traits.dtype)
        return traits

    def differentiable(self, traits: Tensor) -> Tensor:
        """ε (N), with its graph; moves the running statistics of Ω's BatchNorm."""
        with torch.enable_grad():
            return self.perturbation(traits)

    @torch.no_grad()
    def values(self, traits: Tensor, moves_buffers: bool) -> Tensor:
        """ε (N); the running statistics of Ω's BatchNorm move once an iteration."""
        if moves_buffers:
            return self.perturbation(traits)
        buffers = {name: buffer.clone() for name, buffer in self.perturbation.named_buffers()}
        return functional_call(self.perturbation, buffers, (traits,))

    def parameters(self) -> list[Tensor]:
        """Those of Ω that are trained."""
        return [p for p in self.perturbation.parameters() if p.requires_grad]

    def learn(self, epsilon: Tensor | None, grad: Tensor | None, scale: Any) -> None:
        """Eq. 8, from ε with its graph and the meta loss's gradient by it, (N)."""
        if not self.parameters():
            return
        assert epsilon is not None
        assert grad is not None
        self.step(torch.autograd.grad(epsilon, self.parameters(), grad.to(epsilon.dtype)), scale)

    def step(self, grads: Sequence[Tensor], scale: Any) -> None:
        """Eq. 8, from the gradients by `parameters`; scale: the scaler's factor."""
        if not grads:
            return
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.grad = grad * scale
        self.scaler.step(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Ω and its optimizer."""
        return {
            "perturbation": self.perturbation.state_dict(),
            "perturbation_optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; further entries are left alone."""
        self.perturbation.load_state_dict(state["perturbation"])
        self.optimizer.load_state_dict(state["perturbation_optimizer"])


class ConstantStrengths:
    """The same ε for every sample, with the calls of `LearnedStrengths`; nothing is learned.

    0 is no perturbation: ε is then None throughout, which spares the kernels its terms.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def traits(
        self, features: Tensor, head: nn.Linear, rows: Rows, memory: TrainingMemory
    ) -> Tensor:
        """The features: their number and dtype are all that matters here."""
        return features.detach()

    def differentiable(self, traits: Tensor) -> Tensor | None:
        """ε (N), without a graph."""
        return self.values(traits, True)

    def values(self, traits: Tensor, moves_buffers: bool) -> Tensor | None:
        """ε (N)."""
        return traits.new_full((len(traits),), self.value) if self.value else None

    def parameters(self) -> list[Tensor]:
        """None."""
        return []

    def learn(self, epsilon: Tensor | None, grad: Tensor | None, scale: Any) -> None:
        """Nothing."""

    def step(self, grads: Sequence[Tensor], scale: Any) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
