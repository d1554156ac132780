"""The methods that need no meta set: CE, Logit Adjustment and ISDA, all on `fused_loss`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iada.covariance import ClassCovariance
from iada.distributed import Group, average, gather_rows, row_counts, running_statistics
from iada.loss import fused_loss
from iada.prior import log_class_prior


class FirstOrder:
    """One optimizer step a batch on a special case of Eq. 6.

    covariance None and beta 0 is CE; covariance None and beta 1 is Logit Adjustment (Balanced
    Softmax); a covariance and beta 0 is ISDA, whose alpha is to be ramped.

    Args:
        backbone, head, optimizer, class_counts: as in `MetaIADA`.
        covariance: a `ClassCovariance`, or None.
        alpha, beta: of Eq. 6; plain attributes.
        clip_norm: largest norm of the gradient, 0 for no clipping.
        process_group: ranks that share every batch, each with its rows (see `iada.distributed`).
    """

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
        self.backbone, self.head, self.optimizer = backbone, head, optimizer
        self.log_prior = log_class_prior(class_counts, head.out_features).to(head.weight)
        self.covariance = covariance
        self.alpha, self.beta, self.clip_norm = alpha, beta, clip_norm
        self.group = process_group

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """Plain CE on (inputs, labels, ...); the loss, detached."""
        return self._step(batch, None, 0.0)

    def step(self, batch: Sequence[Any], meta_batch: Sequence[Any] | None = None) -> Tensor:
        """The method's own loss on (inputs, labels, ...), detached; the meta batch is not used."""
        return self._step(batch, self.covariance, self.beta)

    def _step(
        self, batch: Sequence[Any], covariance: ClassCovariance | None, beta: float
    ) -> Tensor:
        inputs, labels = batch[0], batch[1]
        counts = row_counts(len(labels), self.group)
        features = self.backbone(inputs)
        if covariance is not None:  # of the whole batch, by every rank alike
            rows = gather_rows(features, counts, self.group)
            covariance.update(rows, gather_rows(labels, counts, self.group))
        loss = fused_loss(
            features,
            self.head.weight,
            self.head.bias,
            labels,
            covariance=covariance,
            log_prior=self.log_prior,
            alpha=self.alpha,
            beta=beta,
        )
        descend(self.optimizer, loss, self.clip_norm, counts, self.group)
        value = loss.detach()
        average([value, *running_statistics(self.backbone)], counts, self.group)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The covariance with its statistics, where the method has one."""
        return {} if self.covariance is None else {"covariance": self.covariance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if self.covariance is not None:
            self.covariance.load_state_dict(state["covariance"])


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    clip_norm: float,
    counts: Sequence[int] = (),
    group: Group = None,
) -> None:
    """One optimizer step on `loss`, its gradient clipped to `clip_norm` unless that is 0.

    With a group, on the mean of the ranks' losses, weighted by `counts`, their rows.
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for part in optimizer.param_groups for p in part["params"]]
    average([p.grad for p in parameters if p.grad is not None], counts, group)
    if clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
