"""What every backend takes and returns: plain records of tensors, the same for all of them.

A backend is a module with the functions of `Backend`. Callers have checked shapes, dtypes and
devices before; a backend checks nothing and changes no tensor it is given.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """The tensors of Eq. 6. None stands for a term that is absent.

    features (N, A) · weight (C, A) · bias (C) · labels (N) int64 · covariance (C, A, A),
    symmetric, or its diagonal (C, A) · epsilon (N) · log_prior (C).
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    covariance: Tensor | None
    epsilon: Tensor | None
    log_prior: Tensor | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 if any tensor is, else float32: the dtype of the loss and of what leads to it."""
        tensors = (self.features, self.weight, self.bias, self.covariance, self.epsilon)
        for tensor in (*tensors, self.log_prior):
            if tensor is not None and tensor.dtype == torch.float64:
                return torch.float64
        return torch.float32


@dataclass(frozen=True)
class LossOptions:
    """alpha and beta of Eq. 6, the label to leave out, and "none", "mean" or "sum"."""

    alpha: float
    beta: float
    ignore_index: int
    reduction: str


@dataclass(frozen=True)
class LossNeeds:
    """Which gradients are asked for."""

    features: bool
    weight: bool
    bias: bool
    covariance: bool
    epsilon: bool
    log_prior: bool


@dataclass
class LossGradients:
    """The gradients asked for, each in the dtype of its tensor or in the compute dtype."""

    features: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    covariance: Tensor | None = None
    epsilon: Tensor | None = None
    log_prior: Tensor | None = None


class Backend(Protocol):
    """One implementation of the passes, for the devices it serves."""

    def loss_forward(
        self, inputs: LossInputs, options: LossOptions, needs: LossNeeds
    ) -> tuple[Tensor, Any]:
        """The loss in the compute dtype, (N) or (), and whatever the backward pass needs.

        `needs` says which gradients may be asked for, so that a backend can compute them now.
        """

    def loss_backward(
        self,
        inputs: LossInputs,
        options: LossOptions,
        saved: Any,
        grad_loss: Tensor,
        needs: LossNeeds,
    ) -> LossGradients:
        """Gradients; may be called again with the same `saved`."""

    def covariance_update(
        self, covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
    ) -> None:
        """One batch of the streaming update, in place on covariance, mean and count."""
