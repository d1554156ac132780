"""Meta-Weight-Net: each sample's weight by a small network of its loss, learned on the meta set.

Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping for Sample Weighting", NeurIPS 2019:

    φ̄ = φ − η ∇_φ (1/n) Σ V(ℓ_i; Θ) ℓ_i(φ)          virtual step, ℓ_i in V a constant
    Θ ← Θ − Adam of ∇_Θ (1/m) Σ ℓ^CE(φ̄)              on the meta batch
    φ ← φ − η ∇_φ (1/n) Σ V(ℓ_i; Θ) ℓ_i(φ)            with the new Θ

The weights enter the virtual step linearly, so that dL_meta/dV_i = (1/n) ℓ̇_i, where ℓ̇_i is the
derivative of the sample's loss along −η ∇L_meta(φ̄): the engine's passes give it without a graph of
a gradient, as they do for Meta-IADA.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.bilevel import BilevelMethod
from iada.meta.hypergradient import ForwardPass
from iada.meta.learner import HeadGradients, ShardedBatch, detached, linear
from iada.meta.options import MetaStepOptions
from iada.methods.options import BilevelOptions, MethodRun
from iada.utils.settings import setting
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


class MetaWeightNet(BilevelMethod):
    """See above.

    Args:
        run: what it is built for.
        options: of the meta step; of the hypergradients not "double-backward".
        weight_net: V; on the head's device and in its precision, float32 at least.
        weight_lr: Adam's on Θ, 1e-3 in the paper.
    """

    def __init__(
        self, run: MethodRun, options: MetaStepOptions, weight_net: WeightNet, weight_lr: float
    ) -> None:
        options.refuse_double_backward("for Meta-Weight-Net", "leave it at 'jvp'")
        super().__init__(options=options, **run.arguments)
        self.weight_net = weight_net
        parameters = weight_net.parameters()
        self.weight_optimizer = torch.optim.Adam(parameters, weight_lr, weight_decay=WEIGHT_DECAY)

    def observe(self, forward: ForwardPass) -> Tensor:
        """CE of each sample, (N), detached."""
        weight, bias = detached(self.head)
        logits = linear(forward.global_features, weight, bias)
        return F.cross_entropy(logits, forward.rows.labels, reduction="none")

    def meta_step(
        self, forward: ForwardPass, observed: Tensor, meta_rows: ShardedBatch
    ) -> tuple[Tensor, Tensor]:
        """Moves Θ."""
        with torch.enable_grad():
            weights = self.weight_net(observed)
        _, gradients = self._weighted(forward, weights.detach())
        meta = self._meta_passes.run(forward, gradients, meta_rows)
        self._meta_loss = meta.meta_loss
        inputs = (forward.global_features, *detached(self.head), forward.rows.labels)
        slopes = loss_tangents(*inputs, meta.tangents)
        self.weight_optimizer.zero_grad()
        weights.backward(slopes.to(weights.dtype) / len(slopes))
        self.weight_optimizer.step()
        return meta.features, observed

    def training_gradients(
        self, forward: ForwardPass, observed: Tensor, after_meta_step: bool
    ) -> tuple[Tensor, HeadGradients, None]:
        """(1/n) Σ V_i ℓ_i with the new Θ."""
        with torch.no_grad():
            weights = self.weight_net(observed)
        return *self._weighted(forward, weights), None

    def _weighted(self, forward: ForwardPass, weights: Tensor) -> tuple[Tensor, HeadGradients]:
        """(1/n) Σ V_i ℓ_i and its gradients by features and head."""

        def loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = linear(features, weight, bias)
            losses = F.cross_entropy(logits, forward.rows.labels, reduction="none")
            return torch.linalg.vecdot(losses, weights.to(losses.dtype)) / len(losses)

        return self._learner.head_gradients(loss, forward.global_features)

    def get_extra_state(self) -> dict[str, Any]:
        """Where the iterations stand, and the state of Θ's optimizer."""
        state = super().get_extra_state()
        return {**state, "weight_optimizer": self.weight_optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        super().set_extra_state(state)
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])


@dataclass(frozen=True)
class MetaWeightNetOptions(BilevelOptions):
    """Meta-Weight-Net (Shu et al., NeurIPS 2019).

    perturbation_lr: Adam's on the network.
    """

    perturbation_lr: float = setting(1e-3, above=0)

    @property
    def meta_learns(self) -> bool:
        return True

    def build(self, run: MethodRun) -> MetaWeightNet:
        network = run.placed(WeightNet())
        return MetaWeightNet(run, self.meta_step, network, self.perturbation_lr)
