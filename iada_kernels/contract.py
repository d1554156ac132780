"""What every backend takes and returns: plain records of tensors, the same for all of them.

A backend is a module with the functions of `Backend`. Callers have checked shapes, dtypes and
devices before; a backend checks nothing and changes no tensor it is given, but those that it is
named to update.
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


@dataclass(frozen=True)
class ClassStatistics:
    """What the streaming covariance keeps beside Σ: mean (C, A) and count (C) int64."""

    mean: Tensor
    count: Tensor


@dataclass(frozen=True)
class HeadTangents:
    """A direction in which features and head move: ḣ (N, A), V (C, A), v_b (C); None for 0.

    In the compute dtype of the inputs they belong to.
    """

    features: Tensor | None
    weight: Tensor
    bias: Tensor | None


class Backend(Protocol):
    """One implementation of the passes, for the devices it serves."""

    def loss_forward(
        self,
        inputs: LossInputs,
        options: LossOptions,
        needs: LossNeeds,
        stream: ClassStatistics | None = None,
    ) -> tuple[Tensor, Any]:
        """The loss in the compute dtype, (N) or (), and whatever the backward pass needs.

        `needs` says which gradients may be asked for, so that a backend can compute them now.
        With `stream`, the batch is first taken into `inputs.covariance`, `stream.mean` and
        `stream.count`, in place, as `covariance_update` does; ignored rows are left out.
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

    def hypergradient(
        self,
        inputs: LossInputs,
        options: LossOptions,
        tangents: HeadTangents,
        needs_covariance: bool,
    ) -> tuple[Tensor | None, Any]:
        """How the loss's derivative along `tangents` depends on epsilon and on the covariance.

        The first is a gradient (N) in the compute dtype, None without epsilon. The second is what
        `covariance_step` takes, None if not needed. `options.reduction` is "mean" or "sum".
        """

    def covariance_step(
        self, covariance: Tensor, weight: Tensor, weight_tangent: Tensor, sums: Any, scale: float
    ) -> None:
        """Add `scale` times the gradient by the covariance in place; `sums` by `hypergradient`.

        The gradient is symmetric. Classes without samples keep their bits.
        """

    def characteristics(
        self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
    ) -> Tensor:
        """The eight characteristics that a batch shows by itself, (N, 8); see `reference`."""
