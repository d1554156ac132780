"""What a trainer drives: a classifier with its optimizer, one step a batch, and a state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.backbone_passes import BackbonePasses
from iada.meta.learner import (
    Classifier,
    Learner,
    ShardedBatch,
    check_classifier,
    check_optimizer,
)
from iada.nn.class_covariance import ClassCovariance
from iada.nn.functional import fused_loss
from iada.nn.precision import KeepsPrecision
from iada.utils.checks import check_number
from iada.utils.distributed import Group

HeadLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Batch = Sequence[Any]  # (inputs, labels) or (inputs, labels, index)
Order = Sequence[list[int]]  # rows of the training set for each step


@dataclass(frozen=True)
class MetaStep:
    """What one iteration did, as detached tensors: reading one waits for its device.

    All of the whole batch where processes share it.

    Attributes:
        loss: Eq. 10's loss before its step, ().
        meta_loss: CE at φ̄, (), of the last meta step where this iteration had none.
        epsilon: ε of Eq. 10, (N); None without a perturbation.
    """

    loss: Tensor
    meta_loss: Tensor
    epsilon: Tensor | None


class Method(KeepsPrecision):
    """Trains a backbone and a head, one step of their optimizer a batch.

    Subclasses give `loss`, or a `step` of their own. What a method keeps beside the classifier (Σ,
    a network, statistics) is in its parameters, buffers and extra state, so that `state_dict`,
    `.to()` and checkpoints carry it. Backbone, head, optimizer and scaler stay the caller's: they
    are no submodules. A parameter of the method's own in that optimizer learns by `loss`.

    Gradients are taken without `backward`: hooks on the head's parameters are not called, and those
    on the backbone's in each pass of a meta step.

    Args:
        backbone: module from inputs to features (N, A).
        head: the last layer, nn.Linear(A, C).
        optimizer: any torch optimizer over the parameters of both that needs no closure.
        clip_norm: largest norm of the gradient, 0 for no clipping.
        scaler: torch.amp.GradScaler for float16.
        process_group: ranks that share every batch, each with its rows: `iada.utils.distributed`.

    Attributes:
        alpha: of Eq. 6, to be set before each epoch; methods without that term leave it unread.
        covariance: Σ, if the method keeps one.
    """

    covariance: ClassCovariance | None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        process_group: Group = None,
    ) -> None:
        check_classifier(backbone, head)
        check_optimizer(optimizer)
        check_number("clip_norm", clip_norm, 0.0, "0 is no clipping")
        super().__init__()
        device = head.weight.device
        self.alpha, self.clip_norm = 0.0, clip_norm
        self.register_module("covariance", None)
        scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self._learner = Learner(Classifier(backbone, head), optimizer, scaler, process_group)
        self._passes = BackbonePasses(backbone, head)

    @property
    def classifier(self) -> Classifier:
        """Backbone and head, the caller's."""
        return self._learner.classifier

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of backbone and head, the caller's; a wrapper of it may be set in its place."""
        return self._learner.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._learner.optimizer = optimizer

    @property
    def head(self) -> nn.Linear:
        """From features to the logits that an evaluation goes by."""
        return self.classifier.head

    @property
    def num_samples(self) -> int:
        """Of the training set, where the method keeps something for each sample; else 0."""
        return 0

    @property
    def needs_meta_batch(self) -> bool:
        """Whether the next `step` looks at its meta batch."""
        return False

    def meta_steps(self, count: int) -> Sequence[bool]:
        """Which of the next `count` steps will look at theirs, so that it can be loaded ahead."""
        return [False] * count

    def prepare(self) -> None:
        """Called before each epoch of the method's own, first: a pass over the training set, once.

        Only where there is one: its time is part of what `paper --dry-run` says.
        """

    def seen_by_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (N, A) and Σ as the method's loss takes them, for the terms of Table 1."""
        return features, None if self.covariance is None else self.covariance.shrunk()

    def begin_epoch(self, epoch: int, order: Order, first_step: int) -> Order:
        """Called before the steps of each epoch of the method's own, and when one goes on.

        Args:
            epoch: of the run, from 0.
            order: rows of the training set for each step still to come in this epoch.
            first_step: of these, in the run.

        Returns:
            The rows to be loaded for each of these steps: as they are, or more of them if the
            method wants further samples beside them.
        """
        return order

    def step(self, batch: Batch, meta_batch: Batch | None = None) -> Tensor | MetaStep:
        """One step on (inputs, labels, ...), detached: its loss (), or a `MetaStep`.

        A method that looks at meta batches gives a `MetaStep`.
        """
        rows = self._shard(batch)
        return self._supervised_step(rows, lambda h, w, b: self.loss(h, w, b, rows.labels))

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """One step of plain CE, before the method's own epochs; its loss (), detached."""
        rows = self._shard(batch)
        return self._supervised_step(rows, lambda h, w, b: self.cross_entropy(h, w, b, rows.labels))

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The method's loss () of the head on features (N, A), labels (N)."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} has neither `loss` nor a `step` of its own")

    def cross_entropy(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """The loss () of the epochs of plain CE."""
        return fused_loss(features, weight, bias, labels)

    def end_epoch(self) -> None:
        """Called after each epoch, those of plain CE too."""

    def learned(self) -> list[Tensor]:
        """What must stay finite beside the parameters of backbone and head."""
        sigma = [] if self.covariance is None else [self.covariance.covariance]
        return [*sigma, *self.parameters()]

    def _trained(self) -> list[Tensor]:
        """The method's own parameters that the classifier's optimizer moves."""
        own: list[Tensor] = [p for p in self.parameters() if p.requires_grad]
        if not own:
            return own
        moved = {p for group in self.optimizer.param_groups for p in group["params"]}
        return [parameter for parameter in own if parameter in moved]

    def _shard(self, batch: Sequence[Any]) -> ShardedBatch:
        """The training batch, checked."""
        return self._learner.shard_batch("batch", batch, self.num_samples)

    def _supervised_step(self, rows: ShardedBatch, loss: HeadLoss) -> Tensor:
        """One step on a loss of the whole batch's features, weight and bias; detached."""
        with self._passes.own_autocast():
            features = self._passes.forward_and_update_buffers(rows.inputs)
            gathered = self._learner.gather(features, rows)
            value, grads = self._learner.head_gradients(loss, gathered, self._trained())
            self._learner.apply_gradients(features, grads, rows, self.clip_norm)
        return value
