"""Meta-Weight-Net: each sample's weight by a small network of its loss, learned on the meta set.

Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping for Sample Weighting", NeurIPS 2019:

    φ̄ = φ − η ∇_φ (1/n) Σ V(ℓ_i; Θ) ℓ_i(φ)          virtual step, ℓ_i in V a constant
    Θ ← Θ − Adam of ∇_Θ (1/m) Σ ℓ^CE(φ̄)              on the meta batch
    φ ← φ − η ∇_φ (1/n) Σ V(ℓ_i; Θ) ℓ_i(φ)            with the new Θ

The weights enter the virtual step linearly, so that dL_meta/dV_i = (1/n) ℓ̇_i, where ℓ̇_i is the
derivative of the sample's loss along −η ∇L_meta(φ̄): the engine's passes give it without a graph of
a gradient, as they do for Meta-IADA.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.backbone_passes import Passes, RandomState
from iada.meta.feature_jvp import DIFFERENCES, GRAPH, FeatureTangent
from iada.meta.hypergradient import MetaPasses
from iada.meta.learner import Classifier, Learner, check_classifier, linear
from iada.meta.plain import plain_step
from iada.meta.step_result import MetaStep
from iada.meta.virtual_step import VirtualStep
from iada.nn.class_covariance import ClassCovariance
from iada.utils.checks import complain
from iada.utils.distributed import Group
from iada_kernels.contract import HeadTangents

WEIGHT_DECAY = 1e-4  # of Adam on Θ, in the published code


class WeightNet(nn.Module):
    """V(ℓ; Θ): Linear(1, 100) → ReLU → Linear(100, 1) → sigmoid; losses (N) to weights (N)."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, losses: Tensor) -> Tensor:
        """(N) → (N) in (0, 1)."""
        return self.weight(self.hidden(losses[:, None]).relu()).squeeze(1).sigmoid()


def loss_tangents(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, tangents: HeadTangents
) -> Tensor:
    """How CE of each sample, (N), changes as features and head move along `tangents`."""
    probability = linear(features, weight, bias).softmax(dim=1)
    moved = linear(features, tangents.weight, tangents.bias)
    if tangents.features is not None:
        moved = moved + linear(tangents.features.to(features.dtype), weight, None)
    # Against the own class: p_y − 1 would cancel.
    moved = moved - moved.gather(1, labels[:, None])
    return torch.linalg.vecdot(probability, moved)


class MetaWeightNet:
    """See above.

    Args:
        weight_net: V; on the head's device and in its precision, float32 at least.
        weight_lr: Adam's on Θ, 1e-3 in the paper.
        others: as in `MetaIADA`; of the hypergradients not "double-backward".
    """

    covariance: ClassCovariance | None = None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        *,
        weight_net: WeightNet,
        weight_lr: float = 1e-3,
        clip_norm: float = 0.0,
        hypergradient: str = "jvp",
        scope: str = "full",
        interval: int = 1,
        low_memory: bool = False,
        process_group: Group = None,
    ) -> None:
        check_classifier(backbone, head)
        ways = {"jvp": GRAPH, "finite-difference": DIFFERENCES}
        if hypergradient not in ways:
            expected = "'jvp' or 'finite-difference' for Meta-Weight-Net"
            raise complain("hypergradient", expected, repr(hypergradient), "leave it at 'jvp'")
        self.alpha = 0.0
        self.weight_net, self.clip_norm, self.interval = weight_net, clip_norm, interval
        self.weight_optimizer = torch.optim.Adam(
            weight_net.parameters(), lr=weight_lr, weight_decay=WEIGHT_DECAY
        )
        device = head.weight.device
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self._learner = Learner(Classifier(backbone, head), optimizer, scaler, process_group)
        self._passes = Passes(backbone, device)
        self._tangent = FeatureTangent(self._passes, ways[hypergradient])
        self._meta_passes = MetaPasses(
            self._learner, self._passes, self._tangent, VirtualStep(), scope, low_memory
        )
        self._steps = 0
        dtype = torch.promote_types(torch.float32, head.weight.dtype)
        self._meta_loss = torch.full((), torch.nan, dtype=dtype, device=device)

    @property
    def head(self) -> nn.Linear:
        """The classifier's last layer."""
        return self._learner.classifier.head

    @property
    def needs_meta_batch(self) -> bool:
        """Whether the next `step` makes a meta step: with interval=k one in k does."""
        return self._steps % self.interval == 0

    def meta_steps(self, count: int) -> Sequence[bool]:
        """Which of the next `count` steps make a meta step."""
        return [step % self.interval == 0 for step in range(self._steps, self._steps + count)]

    def begin_epoch(
        self, epoch: int, order: Sequence[list[int]], first_step: int
    ) -> Sequence[list[int]]:
        """The rows as they are."""
        return order

    def step(self, batch: Sequence[Any], meta_batch: Sequence[Any] | None = None) -> MetaStep:
        """One iteration on (inputs, labels, ...); the meta batch counts if `needs_meta_batch`."""
        rows = self._learner.rows("batch", batch, 0)
        meta_rows = None
        if self.needs_meta_batch:
            meta_rows = self._learner.rows("meta_batch", meta_batch, 0)
        with self._passes.own_autocast():
            random_state = RandomState.now(self._passes.device)
            features = self._passes.first(rows.inputs)
            whole = self._learner.gather(features, rows)
            weight = self.head.weight.detach()
            bias = None if self.head.bias is None else self.head.bias.detach()
            losses = F.cross_entropy(linear(whole, weight, bias), rows.labels, reduction="none")
            if meta_rows is not None:
                with torch.enable_grad():
                    weights = self.weight_net(losses)
                _, grads = self._weighted(whole, rows.labels, weights.detach())
                found = self._meta_passes.run(features, grads, rows, random_state, meta_rows)
                features, self._meta_loss = found.features, found.meta_loss
                slopes = loss_tangents(whole, weight, bias, rows.labels, found.tangents)
                self.weight_optimizer.zero_grad()
                weights.backward(slopes.to(weights.dtype) / len(slopes))
                self.weight_optimizer.step()
            with torch.no_grad():
                weights = self.weight_net(losses)
            loss, grads = self._weighted(whole, rows.labels, weights)
            self._learner.descend(features, grads, rows, self.clip_norm)
        self._steps += 1
        return MetaStep(loss, self._meta_loss, None)

    def _weighted(self, whole: Tensor, labels: Tensor, weights: Tensor) -> Any:
        """(1/n) Σ V_i ℓ_i and its gradients by features and head."""

        def loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            losses = F.cross_entropy(linear(features, weight, bias), labels, reduction="none")
            return torch.linalg.vecdot(losses, weights.to(losses.dtype)) / len(losses)

        return self._learner.head_gradients(loss, whole)

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """One step of plain CE; the loss, detached."""
        rows = self._learner.rows("batch", batch, 0)

        def loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.cross_entropy(linear(features, weight, bias), rows.labels)

        return plain_step(self._learner, self._passes, rows, loss, self.clip_norm)

    def end_epoch(self) -> None:
        """Nothing is kept from epoch to epoch."""

    def learned(self) -> list[Tensor]:
        """Θ."""
        return [*self.weight_net.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """Θ, its optimizer, and where the engine stands."""
        return {
            "weight_net": self.weight_net.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "steps": self._steps,
            "meta_loss": self._meta_loss,
            "way": self._tangent.way,
            "math_attention": self._passes.math_attention,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.weight_net.load_state_dict(state["weight_net"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self._steps = state["steps"]
        self._meta_loss = state["meta_loss"].to(self._meta_loss)
        self._tangent.way = state["way"]
        self._passes.math_attention = state["math_attention"]
