"""The classifier φ under training: gradients from the head down, and the optimizer's step.

The head is computed on the features of the whole batch; the gradient by the features then goes
down the backbone. Where processes share a batch, each computes the whole head by itself and takes
its own rows down; the backbone's gradients are added up over the processes.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.graph_jvp import graph_order
from iada.utils.checks import (
    argument_error,
    check_indices,
    check_label_values,
    check_labels,
    check_tensor,
    values_are_checked,
)
from iada.utils.distributed import (
    Group,
    GroupReference,
    any_rank,
    average,
    check_unwrapped,
    gather_objects,
    gather_rows,
    rank_of,
    row_counts,
    running_statistics,
)


@dataclass(frozen=True)
class ShardedBatch:
    """One batch: this process's inputs, everybody's labels (N) int64 and places in the data (N).

    counts: rows of each process. own: this one's among the N.
    """

    inputs: Any
    labels: Tensor
    index: Tensor | None
    counts: Sequence[int]
    own: slice


@dataclass(frozen=True)
class HeadGradients:
    """Of a loss by features (N, A), weight (C, A) and bias (C); None for what stays fixed.

    others: by parameters of the loss's own.
    """

    features: Tensor
    weight: Tensor | None
    bias: Tensor | None
    others: Mapping[Tensor, Tensor] = field(default_factory=dict)


class Classifier(nn.Module):
    """Backbone and head as one module that gives features (N, A) and logits (N, C)."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Features h (N, A) and logits z = Wh + b (N, C)."""
        features = self.backbone(inputs)
        return features, self.head(features)


def check_classifier(backbone: nn.Module, head: nn.Module) -> None:
    if not isinstance(head, nn.Linear):
        expected = "the classifier's last layer, an nn.Linear"
        remedy = "split the model into a backbone that returns features and its last nn.Linear"
        raise argument_error("head", expected, f"a {type(head).__name__}", remedy)
    if not isinstance(head.weight, nn.Parameter):
        expected = "an nn.Linear whose weight is a parameter"
        remedy = "remove it: torch.nn.utils.parametrize.remove_parametrizations(head, 'weight')"
        raise argument_error("head", expected, "a parametrized one", remedy)
    check_unwrapped(backbone, head)
    own_forward = type(head).forward is not nn.Linear.forward
    if own_forward or head._forward_pre_hooks:
        got = f"{type(head).__name__} with a forward or hooks of its own"
        remedy = "the losses take W and b and never call it; for weight_norm use a plain layer"
        raise argument_error("head", "an nn.Linear that is Wh + b", got, remedy)


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        remedy = "pass one over the parameters of backbone and head"
        raise argument_error("optimizer", "a torch optimizer", type(optimizer).__name__, remedy)
    if isinstance(optimizer, torch.optim.LBFGS):
        remedy = "a method takes one gradient a step: pass SGD, Adam or another such"
        raise argument_error("optimizer", "one that steps without a closure", "LBFGS", remedy)


class Learner:
    """Takes gradients of the classifier and steps its optimizer.

    Args:
        classifier, optimizer: what is trained, and by what.
        scaler: a GradScaler, enabled or not.
        group: of the processes that share each batch.
    """

    def __init__(
        self,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        group: Group,
    ) -> None:
        self.classifier, self.optimizer = classifier, optimizer
        self.scaler, self._group = scaler, GroupReference(group)
        self._reentrant: bool | None = None
        self._head_looked_at: Tensor | None = None
        # Whether each rank's rows went through all of these parameters, the first time.
        self._all_used: dict[tuple[int, ...], bool] = {}

    @property
    def group(self) -> Group:
        """Of the processes that share each batch."""
        return self._group()

    def shard_batch(self, name: str, batch: Any, num_samples: int) -> ShardedBatch:
        """A batch, checked: (inputs, labels) or (inputs, labels, index)."""
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise _no_batch(name, batch)
        self._group.tell_of_others("method", stacklevel=4)  # who called step
        inputs, labels, *rest = batch
        index = rest[0] if rest and num_samples else None
        check_tensor("labels", labels, f"the class indices of {name}")
        rows = len(labels) if labels.dim() else 1
        check_labels(labels, rows)
        if index is not None:
            check_indices(f"{name} index", index, rows, "places in the training set")
            index = index.long()
        counts = row_counts(len(labels), self.group)
        labels = gather_rows(labels.long(), counts, self.group)
        if index is not None:
            index = gather_rows(index, counts, self.group)
        if values_are_checked(labels.device):
            check_label_values(labels, self.classifier.head.out_features, None)
            if index is not None and num_samples and len(index):
                low, high = index.aminmax()
                if low < 0 or high >= num_samples:
                    expected = f"places in [0, {num_samples}), the samples that the method knows"
                    remedy = "build it (or its TrainingMemory) for the whole training set"
                    got = f"{int(low)} to {int(high)}"
                    raise argument_error(f"{name} index", expected, got, remedy)
        rank = rank_of(self.group)
        start = sum(counts[:rank])
        return ShardedBatch(inputs, labels, index, counts, slice(start, start + counts[rank]))

    def gather(self, features: Tensor, rows: ShardedBatch) -> Tensor:
        """The features of the whole batch, detached, in the precision of the head's mathematics."""
        weight = self.classifier.head.weight
        shape = (rows.own.stop - rows.own.start, weight.shape[1])
        if not isinstance(features, Tensor) or features.shape != shape:
            got = f"a {type(features).__name__}"
            if isinstance(features, Tensor):
                got = f"shape {tuple(features.shape)}"
            remedy = "let it return the input of the head alone, flat"
            raise argument_error("backbone", f"features {shape}", got, remedy)
        dtype = torch.promote_types(features.dtype, weight.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        return gather_rows(features, rows.counts, self.group).to(dtype)

    def trained(self) -> list[Tensor]:
        """The classifier's parameters that the optimizer moves."""
        own = set(self.classifier.parameters())
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad and p in own]

    def head_gradients(
        self,
        loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        features: Tensor,
        others: Sequence[Tensor] = (),
    ) -> tuple[Tensor, HeadGradients]:
        """A loss of (features, weight, bias), detached, and its gradients; features (N, A).

        The loss depends on the features; weight, bias and its own parameters `others` it may
        leave out.
        """
        head = self.classifier.head
        features, (weight, bias) = features.detach().requires_grad_(), detached(head)
        weight.requires_grad_(head.weight.requires_grad)
        if bias is not None:
            bias.requires_grad_(head.bias.requires_grad)
        with torch.enable_grad():
            value = loss(features, weight, bias)
        leaves: list[Any] = [features, weight, bias, *others]
        asked = [leaf is not None and leaf.requires_grad for leaf in leaves]
        wanted = itertools.compress(leaves, asked)
        given = iter(torch.autograd.grad(value, list(wanted), allow_unused=True))
        grads: list[Any] = [next(given) if was_asked else None for was_asked in asked]
        if not others:
            return value.detach(), HeadGradients(*grads)
        own = {p: g for p, g in zip(others, grads[3:], strict=True) if g is not None}
        return value.detach(), HeadGradients(grads[0], grads[1], grads[2], own)

    def gradients(
        self,
        features: Tensor,
        head_gradients: HeadGradients,
        rows: ShardedBatch,
        parameters: Sequence[Tensor],
        retain: bool = False,
    ) -> dict[Tensor, Tensor]:
        """Gradients of the loss by `parameters`, times `scale`; of those that it depends on.

        Args:
            features: this process's, with their graph.
            retain: keep the graph.
        """
        found: dict[Tensor, Tensor] = {}
        asked = set(parameters)
        below = [p for p in self.classifier.backbone.parameters() if p in asked]
        if features.requires_grad and below:
            own = head_gradients.features[rows.own]
            # A mean over the processes, weighted by rows, is to give the sum.
            own = own * (self.scale() * (len(rows.labels) / max(1, len(own))))
            grads = self._backbone_gradients(features, below, own.to(features.dtype), retain)
            found = dict(zip(below, self._of_all_ranks(below, grads, rows), strict=True))
            found = {p: g for p, g in found.items() if g is not None}
        head = self.classifier.head
        by_head = ((head.weight, head_gradients.weight), (head.bias, head_gradients.bias))
        for parameter, grad in (*by_head, *head_gradients.others.items()):
            if grad is not None and parameter in asked:
                grad = (grad * self.scale()).to(parameter.dtype)
                found[parameter] = grad if parameter not in found else found[parameter] + grad
        return found

    def _backbone_gradients(
        self, features: Tensor, parameters: Sequence[Tensor], grad: Tensor, retain: bool
    ) -> Sequence[Any]:
        if self._reentrant is None:
            names = [node.name() for node, _ in graph_order(features)]
            self._reentrant = "CheckpointFunctionBackward" in names
        if not self._reentrant:
            options = {"retain_graph": retain, "allow_unused": True}
            return torch.autograd.grad(features, parameters, grad, **options)
        # torch.utils.checkpoint(use_reentrant=True) allows backward() alone.
        every = list(self.classifier.parameters())
        before = [p.grad for p in every]
        for p in every:
            p.grad = None
        torch.autograd.backward(features, grad, retain_graph=retain)
        found = [p.grad for p in parameters]
        for p, former in zip(every, before, strict=True):
            p.grad = former
        return found

    def _of_all_ranks(
        self, parameters: Sequence[Tensor], grads: Sequence[Any], rows: ShardedBatch
    ) -> Sequence[Any]:
        """The same averaged over the ranks; None for what no rank's rows went through.

        Ranks may go through different layers (stochastic depth, experts): all of them take part
        with zeros for the others'.
        """
        own = [g if g is None or g.is_sparse else g.contiguous() for g in grads]
        if self.group is None:
            return own
        used = [g is not None for g in own]
        key = tuple(map(id, parameters))
        if key not in self._all_used:
            self._all_used[key] = not any_rank(not all(used), self.group)
        if not self._all_used[key]:  # else nothing is exchanged but the gradients
            used = [any(flags) for flags in zip(*gather_objects(used, self.group), strict=True)]
        filled = [
            torch.zeros_like(p) if g is None and (wanted or self._all_used[key]) else g
            for p, g, wanted in zip(parameters, own, used, strict=True)
        ]
        average([g for g in filled if g is not None], rows.counts, self.group)
        return filled

    def _warn_of_a_forgotten_head(self, trained: Sequence[Tensor]) -> None:
        weight = self.classifier.head.weight
        if weight.requires_grad and weight not in set(trained):
            warnings.warn(
                "optimizer: expected the head's parameters among its own, got none of its weight; "
                "the head is not trained: pass [*backbone.parameters(), *head.parameters()], of "
                "the head as it is now, or freeze it with head.requires_grad_(False)",
                stacklevel=4,
            )

    def scale(self) -> Any:
        """The scaler's factor, a tensor (); 1.0 without one."""
        if not self.scaler.is_enabled():
            return 1.0
        return self.scaler.scale(torch.ones((), device=self.classifier.head.weight.device))

    def unscaled(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What `gradients` gave, without the scaler's factor."""
        if not self.scaler.is_enabled():
            return dict(gradients)
        inverse = 1.0 / self.scale()
        return {parameter: grad * inverse for parameter, grad in gradients.items()}

    def apply_gradients(
        self, features: Tensor, head_gradients: HeadGradients, rows: ShardedBatch, clip_norm: float
    ) -> None:
        """One step of the optimizer, its gradient clipped to `clip_norm` unless that is 0.

        BatchNorm's running statistics, of this process's rows so far, are averaged as well.
        """
        trained = [*self.trained(), *head_gradients.others]
        weight = self.classifier.head.weight
        if self._head_looked_at is not weight:  # at first, and where it has been replaced
            self._head_looked_at = weight
            self._warn_of_a_forgotten_head(trained)
        gradients = self.gradients(features, head_gradients, rows, trained)
        self.optimizer.zero_grad()
        for parameter, grad in gradients.items():
            parameter.grad = grad
        if clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(list(gradients), clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        average(running_statistics(self.classifier.backbone), rows.counts, self.group)


def _no_batch(name: str, batch: Any) -> ValueError:
    got = "None" if batch is None else f"a {type(batch).__name__}"
    remedy = "pass a tuple"
    if isinstance(batch, Mapping):
        remedy = "take the labels out of it: (inputs, inputs.pop('labels')), inputs may stay a dict"
    elif batch is None:
        remedy = (
            "pass one from iada.endless(meta_loader); only a step before which needs_meta_batch "
            "is False (interval > 1) goes without"
        )
    return argument_error(name, "(inputs, labels) or (inputs, labels, index)", got, remedy)


def linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Wh + b in the dtype of the features."""
    bias = None if bias is None else bias.to(features.dtype)
    return F.linear(features, weight.to(features.dtype), bias)


def detached(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as constants."""
    return head.weight.detach(), None if head.bias is None else head.bias.detach()


def check_meta_loss(value: Tensor) -> None:
    """Finite, where values are checked."""
    if values_are_checked(value.device) and not torch.isfinite(value):
        got, remedy = str(float(value)), "look for bad numbers in its inputs, or lower lr"
        expected = "a finite cross-entropy after the virtual step"
        raise argument_error("meta_batch", expected, got, remedy)
