"""Meta-Weight-Net: each sample's weight by a small network of its loss, learned on the meta set.

Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping for Sample Weighting", NeurIPS 2019:

    φ̄ = φ − η ∇_φ (1/n) Σ V(ℓ_i; Θ) ℓ_i(φ)          virtual step, ℓ_i in V a constant
    Θ ← Θ − Adam of ∇_Θ (1/m) Σ ℓ^CE(φ̄)              on the meta batch
    φ ← φ − η ∇_φ (1/n) Σ V(ℓ_i; Θ) ℓ_i(φ)            with the new Θ

The weights enter the virtual step linearly, so that dL_meta/dV_i = (1/n) ℓ̇_i, where ℓ̇_i is the
derivative of the sample's loss along −η ∇L_meta(φ̄): the engine's passes give it without a graph of
a gradient, as they do for Meta-IADA.

This is the form of the published code for wrong labels (xjtushujun/meta-weight-net), and the
default. That for class imbalance (xjtushujun/Meta-weight-net_class-imbalance) is another:

- weights are n V_i / Σ_k V_k: the loss is the weighted mean (`normalized`);
- in the virtual step V's argument is no constant. Its gradient is then (1/n) Σ c_i ∇ℓ_i(φ) with
  c_i = ∂(Σ_k w_k ℓ_k)/∂ℓ_i, still linear in what depends on Θ; φ's own step takes the weights as
  constants (`through_loss`);
- Θ is moved by SGD at 1e-5 with Nesterov momentum 0.9 and weight decay 5e-4
  (`perturbation_optimizer` and the like).
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

OPTIMIZERS = ("Adam", "SGD")
MOMENTUM = 0.9  # of SGD on Θ


class WeightNet(nn.Module):
    """V(ℓ; Θ): Linear(1, 100) → ReLU → Linear(100, 1) → sigmoid; losses (N) to weights (N)."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, losses: Tensor) -> Tensor:
        """(N) → (N) in (0, 1)."""
        return self.scores(losses).sigmoid()

    def scores(self, losses: Tensor) -> Tensor:
        """What the sigmoid is taken of, (N) → (N)."""
        return self.weight(self.hidden(losses[:, None]).relu()).squeeze(1)


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
        weight_optimizer: of Θ.
        normalized: weights are n V_i / Σ_k V_k, over the batch.
        through_loss: in the virtual step V's argument is no constant.
    """

    def __init__(
        self,
        run: MethodRun,
        options: MetaStepOptions,
        weight_net: WeightNet,
        weight_optimizer: torch.optim.Optimizer,
        *,
        normalized: bool = False,
        through_loss: bool = False,
    ) -> None:
        options.refuse_double_backward("for Meta-Weight-Net", "leave it at 'jvp'")
        super().__init__(options=options, **run.arguments)
        self.weight_net, self.weight_optimizer = weight_net, weight_optimizer
        self.normalized, self.through_loss = normalized, through_loss

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
            weights = self._virtual_weights(observed)
        _, gradients = self._weighted(forward, weights.detach())
        meta = self._meta_passes.run(forward, gradients, meta_rows)
        self._meta_loss = meta.meta_loss
        inputs = (forward.global_features, *detached(self.head), forward.rows.labels)
        slopes = loss_tangents(*inputs, meta.tangents)
        self.weight_optimizer.zero_grad()
        own = list(self.weight_net.parameters())
        weights.backward(slopes.to(weights.dtype) / len(slopes), inputs=own)
        self.weight_optimizer.step()
        return meta.features, observed

    def training_gradients(
        self, forward: ForwardPass, observed: Tensor, after_meta_step: bool
    ) -> tuple[Tensor, HeadGradients, None]:
        """(1/n) Σ w_i ℓ_i with the new Θ."""
        with torch.no_grad():
            weights = self._weights(observed)
        return *self._weighted(forward, weights), None

    def _weights(self, losses: Tensor) -> Tensor:
        """w, (N): V of the losses (N), or that over its mean."""
        if not self.normalized:
            return self.weight_net(losses)
        # As a softmax: the V of a whole batch may round to 0.
        return len(losses) * F.logsigmoid(self.weight_net.scores(losses)).softmax(dim=0)

    def _virtual_weights(self, losses: Tensor) -> Tensor:
        """What the virtual step's gradient has in place of w, (N), with the graph to Θ."""
        if not self.through_loss:
            return self._weights(losses)
        losses = losses.detach().requires_grad_()
        total = torch.linalg.vecdot(losses, self._weights(losses).to(losses.dtype))
        (slopes,) = torch.autograd.grad(total, losses, create_graph=True)
        return slopes

    def _weighted(self, forward: ForwardPass, weights: Tensor) -> tuple[Tensor, HeadGradients]:
        """(1/n) Σ w_i ℓ_i and its gradients by features and head, w a constant."""

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

    The defaults are those of the published code for wrong labels. That for class imbalance has
    normalized = true, through_loss = true, perturbation_optimizer = "SGD", perturbation_lr = 1e-5
    and perturbation_weight_decay = 5e-4.

    perturbation_lr: of the optimizer of the network.
    perturbation_optimizer: "Adam", or "SGD" with Nesterov momentum 0.9.
    perturbation_weight_decay: of either.
    normalized: a batch's weights are divided by their mean.
    through_loss: in the virtual step the argument of the network is no constant.
    """

    perturbation_lr: float = setting(1e-3, above=0)
    perturbation_optimizer: str = setting("Adam", choices=OPTIMIZERS)
    perturbation_weight_decay: float = setting(1e-4, least=0)
    normalized: bool = False
    through_loss: bool = False

    @property
    def meta_learns(self) -> bool:
        return True

    def build(self, run: MethodRun) -> MetaWeightNet:
        network = run.placed(WeightNet())
        form = {"normalized": self.normalized, "through_loss": self.through_loss}
        return MetaWeightNet(run, self.meta_step, network, self._optimizer(network), **form)

    def _optimizer(self, network: WeightNet) -> torch.optim.Optimizer:
        rate, decay = self.perturbation_lr, self.perturbation_weight_decay
        parameters = network.parameters()
        if self.perturbation_optimizer == "Adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay)
        momentum: dict[str, Any] = {"momentum": MOMENTUM, "nesterov": True}
        return torch.optim.SGD(parameters, rate, weight_decay=decay, **momentum)
