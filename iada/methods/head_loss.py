"""The methods that need no meta set: CE, Logit Adjustment and ISDA, all on `fused_loss`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.backbone_passes import Passes
from iada.meta.learner import Classifier, Learner, Rows
from iada.meta.plain import plain_step
from iada.nn.class_covariance import ClassCovariance
from iada.nn.functional import fused_loss
from iada.nn.priors import log_class_prior
from iada.utils.distributed import Group


class FirstOrder:
    """One optimizer step a batch on a loss of the head; here on a special case of Eq. 6.

    covariance None and beta 0 is CE; covariance None and beta 1 is Logit Adjustment (Balanced
    Softmax); a covariance and beta 0 is ISDA, whose alpha is to be ramped.

    Args:
        backbone, head, optimizer, class_counts: as in `MetaIADA`.
        covariance: a `ClassCovariance`, or None.
        alpha, beta: of Eq. 6; plain attributes.
        clip_norm: largest norm of the gradient, 0 for no clipping.
        process_group: ranks that share every batch, each with its rows: `iada.utils.distributed`.
    """

    needs_meta_batch = False

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        class_counts: Tensor,
        *,
        covariance: ClassCovariance | None = None,
        alpha: float = 0.5,
        beta: float = 0.0,
        clip_norm: float = 0.0,
        process_group: Group = None,
    ) -> None:
        device, dtype = head.weight.device, torch.promote_types(torch.float32, head.weight.dtype)
        self.log_prior = log_class_prior(class_counts, head.out_features).to(device, dtype)
        self.covariance = covariance
        self.alpha, self.beta, self.clip_norm = alpha, beta, clip_norm
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self._learner = Learner(Classifier(backbone, head), optimizer, scaler, process_group)
        self._passes = Passes(backbone, device)

    @property
    def head(self) -> nn.Linear:
        """What evaluation classifies features by."""
        return self._learner.classifier.head

    def meta_steps(self, count: int) -> Sequence[bool]:
        """No step takes a meta batch."""
        return [False] * count

    def begin_epoch(
        self, epoch: int, order: Sequence[list[int]], first_step: int
    ) -> Sequence[list[int]]:
        """The rows as they are."""
        return order

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """Plain CE on (inputs, labels, ...); the loss, detached."""
        rows = self._learner.rows("batch", batch, 0)
        return self._descend(rows, lambda h, w, b: self.cross_entropy(h, w, b, rows.labels))

    def step(self, batch: Sequence[Any], meta_batch: Sequence[Any] | None = None) -> Tensor:
        """The method's own loss on (inputs, labels, ...), detached; the meta batch is not used."""
        rows = self._learner.rows("batch", batch, 0)
        return self._descend(rows, lambda h, w, b: self.loss(h, w, b, rows.labels))

    def _descend(
        self, rows: Rows, loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        return plain_step(self._learner, self._passes, rows, loss, self.clip_norm)

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The method's loss () of the head on features (N, A)."""
        if self.covariance is not None:
            self.covariance.update_gathered(features, labels)
        return fused_loss(
            features,
            weight,
            bias,
            labels,
            covariance=self.covariance,
            log_prior=self.log_prior,
            alpha=self.alpha,
            beta=self.beta,
        )

    def cross_entropy(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """The loss of the plain epochs."""
        return fused_loss(features, weight, bias, labels, covariance=None)

    def end_epoch(self) -> None:
        """Nothing is kept from epoch to epoch."""

    def learned(self) -> list[Tensor]:
        """Σ, where the method has one."""
        return [] if self.covariance is None else [self.covariance.covariance]

    def state_dict(self) -> dict[str, Any]:
        """The covariance with its statistics, where the method has one."""
        return {} if self.covariance is None else {"covariance": self.covariance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if self.covariance is not None:
            self.covariance.load_state_dict(state["covariance"])
