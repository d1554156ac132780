"""What every backend takes and returns: plain records of tensors, the same for all of them.

A backend is a module with the functions of `Backend`. Callers have checked shapes, dtypes and
devices before; a backend checks nothing and changes no tensor it is given, but those that it is
named to update.

Records are tuples: operators and autograd take their fields in order, `*inputs`, and the
constructor takes them back.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from iada_kernels.low_rank import is_low_rank
from iada_kernels.triangular import is_triangular


class LossInputs(NamedTuple):
    """The tensors of Eq. 6. None stands for a term that is absent."""

    features: Tensor  # (N, A)
    weight: Tensor  # (C, A)
    bias: Tensor | None  # (C)
    labels: Tensor  # (N) int64
    # (C, A, A), symmetric; its triangles, see `triangular`; its diagonal (C, A); or packed
    # (C, (1 + r) A), see `low_rank`
    covariance: Tensor | None = None
    epsilon: Tensor | None = None  # (N)
    log_prior: Tensor | None = None  # (C)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 if any tensor is, else float32: the dtype of the loss and of what leads to it."""
        for tensor in self:
            if tensor is not None and tensor.dtype is torch.float64:
                return torch.float64
        return torch.float32

    @property
    def has_full_covariance(self) -> bool:
        """Whether Σ is given, and as matrices (C, A, A) or their triangles."""
        return self.covariance is not None and self.covariance.dim() == 3

    @property
    def has_low_rank_covariance(self) -> bool:
        """Whether Σ is given, and packed with at least one factor."""
        return self.covariance is not None and is_low_rank(self.covariance, self.features.shape[-1])

    @property
    def has_compact_covariance(self) -> bool:
        """Whether Σ is given in a form that torch operators read: low-rank, or triangles."""
        sigma, width = self.covariance, self.features.shape[-1]
        return sigma is not None and (is_low_rank(sigma, width) or is_triangular(sigma, width))


class LossOptions(NamedTuple):
    """The numbers of Eq. 6, and how the losses of the rows become one."""

    alpha: float = 0.5  # weight of the quadratic term
    beta: float = 1.0  # weight of the log prior
    ignore_index: int = -100  # the label of rows that are left out
    reduction: str = "mean"  # over the rows that are not left out; or "sum" or "none"
    label_smoothing: float = 0.0  # share of the target that all classes have; by torch_ops alone

    def values(self) -> tuple[float, float, int, str]:
        """Those that operators take: all but the label smoothing."""
        return self.alpha, self.beta, self.ignore_index, self.reduction


class LossNeeds(NamedTuple):
    """Which gradients are asked for, in the order of `LossGradients`."""

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

    def tensors(self) -> list[Tensor | None]:
        """The six in the order of the fields."""
        head = [self.features, self.weight, self.bias]
        return [*head, self.covariance, self.epsilon, self.log_prior]


@dataclass(slots=True)
class ClassStatistics:
    """What the streaming covariance keeps beside Σ."""

    mean: Tensor  # μ (C, A)
    count: Tensor  # n (C) int64


class HeadTangents(NamedTuple):
    """A direction in which features and head move, in the compute dtype; None for 0."""

    features: Tensor | None  # ḣ (N, A)
    weight: Tensor  # V (C, A)
    bias: Tensor | None  # v_b (C)


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
        With `stream`, `inputs.covariance`, `stream.mean` and `stream.count` are first updated in
        place with the rows that are not ignored, as `covariance_update` does.
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

    def covariance_step_bound(
        self, weight: Tensor, weight_tangent: Tensor, sums: Any
    ) -> Tensor | None:
        """At least the Frobenius norm of each class's gradient by a full covariance, (C).

        None where who reads it would wait for the device.
        """

    def characteristics(
        self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
    ) -> Tensor:
        """The eight characteristics that follow from the batch alone, (N, 8); see `reference`."""
