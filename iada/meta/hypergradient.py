"""From the training gradient to the head's tangents: virtual step, meta loss, v and ḣ."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.meta.backbone_passes import BackbonePasses, RandomState
from iada.meta.feature_jvp import GRAPH, Directions, FeatureJVP
from iada.meta.learner import HeadGradients, Learner, ShardedBatch, check_meta_loss, linear
from iada.meta.options import MetaStepOptions
from iada.meta.scope import moved_parameters
from iada.utils.distributed import gather_rows
from iada_kernels.contract import HeadTangents


@dataclass(frozen=True)
class ForwardPass:
    """The training batch's way through the backbone.

    random_state: from which features were computed. features: this process's, with their graph.
    global_features: of the whole batch, (N, A), detached.
    """

    rows: ShardedBatch
    random_state: RandomState
    features: Tensor
    global_features: Tensor


@dataclass(frozen=True)
class MetaGradient:
    """How the meta loss changes with what moves the parameters.

    The hypergradients are those of the training loss's derivative along `tangents`.

    meta_loss: CE at φ̄, (). tangents: −η₁ v as the head sees it, of the whole batch.
    features: of the training batch, with the graph for Eq. 10.
    """

    meta_loss: Tensor
    tangents: HeadTangents
    features: Tensor


@dataclass(frozen=True)
class MetaPasses:
    """The backbone's part of a meta step."""

    learner: Learner
    passes: BackbonePasses
    feature_jvp: FeatureJVP
    options: MetaStepOptions

    def run(
        self, forward: ForwardPass, head_gradients: HeadGradients, meta_rows: ShardedBatch
    ) -> MetaGradient:
        """Eq. 7 and the meta loss, from the gradients of the training loss of the whole batch."""
        features, rows, random_state = forward.features, forward.rows, forward.random_state
        learner, deep = self.learner, self.options.moves_backbone
        backbone, head = learner.classifier.backbone, learner.classifier.head
        own = moved_parameters(backbone, head, learner.trained(), self.options.scope)
        repeat = self.options.low_memory and deep
        gradients = learner.gradients(features, head_gradients, rows, own, not repeat)
        moved = self.options.virtual.take(learner.optimizer, learner.unscaled(gradients))
        del gradients
        slopes = {parameter: slope for parameter, (_, slope) in moved.items()}
        values = {parameter: value for parameter, (value, _) in moved.items()}
        del moved
        with self.passes.substituted(values):
            meta_loss, found = self._meta_loss(list(values), meta_rows)
        if not learner.scaler.is_enabled():  # which expects overflows, and skips their steps
            check_meta_loss(meta_loss)
        del values
        directions = {p: slopes[p] * grad for p, grad in learner.unscaled(found).items()}

        parameters = backbone.parameters()
        below: dict[Tensor, Tensor] = {p: directions[p] for p in parameters if p in directions}
        first = repeat and self.feature_jvp.mode == GRAPH
        if first:
            features = self.passes.forward_replayed(rows.inputs, random_state)
        tangent = None
        if deep and below:
            tangent = self.feature_jvp(features, rows.inputs, random_state, below)
        if repeat and not first:
            features = self.passes.forward_replayed(rows.inputs, random_state)
        if tangent is not None:
            dtype = head_gradients.features.dtype
            tangent = gather_rows(tangent, rows.counts, learner.group).to(dtype)
        return MetaGradient(meta_loss, self._tangents(directions, tangent), features)

    def _meta_loss(
        self, moved: Sequence[Tensor], rows: ShardedBatch
    ) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """CE on the meta batch, and its gradients by the parameters `moved`, scaled."""
        learner = self.learner
        with torch.set_grad_enabled(self.options.moves_backbone):
            features = self.passes.forward_frozen(rows.inputs)

        def loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.cross_entropy(linear(features, weight, bias), rows.labels)

        value, grads = learner.head_gradients(loss, learner.gather(features, rows))
        return value, learner.gradients(features, grads, rows, moved)

    def _tangents(self, directions: Directions, features: Tensor | None) -> HeadTangents:
        head = self.learner.classifier.head
        weight = directions.get(head.weight)
        weight = torch.zeros_like(head.weight) if weight is None else weight
        bias = None if head.bias is None else directions.get(head.bias)
        dtype = torch.promote_types(torch.float32, head.weight.dtype)
        if features is not None:
            dtype = torch.promote_types(dtype, features.dtype)
        bias = None if bias is None else bias.to(dtype)
        return HeadTangents(features, weight.detach().to(dtype), bias)
