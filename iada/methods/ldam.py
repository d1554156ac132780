"""LDAM-DRW: margins by class size on normalised features, and deferred re-weighting.

Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019:

    z_j  = s (cos(h, w_j) − Δ_j [j = y]),   Δ_c ∝ n_c^(−1/4), the largest one ½,   s = 30
    loss = Σ ω_y CE(z, y) / Σ ω_y

with ω = 1 until the re-weighting, from then on `class_balanced_weights`. As in their published code
the weighted sum is divided by the sum of the weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from iada.methods.drw import DeferredReweighting, DeferredReweightingOptions
from iada.methods.options import MethodRun
from iada.nn.priors import checked_counts

SCALE, MAX_MARGIN = 30.0, 0.5


class CosineLinear(nn.Linear):
    """s cos(h, w_j): the logits of a head by its weight alone, which it shares; (N, A) → (N, C)."""

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = head.weight
        self.register_parameter("bias", None)

    def forward(self, features: Tensor) -> Tensor:
        """(N, A) → (N, C)."""
        return cosine_logits(features, self.weight.to(features.dtype))


def cosine_logits(features: Tensor, weight: Tensor) -> Tensor:
    """s cos(h, w_j) of features (N, A) and weight (C, A), (N, C)."""
    return SCALE * F.linear(F.normalize(features), F.normalize(weight))


class LDAM(DeferredReweighting):
    """See above. The head's bias is not used and stays as it is; evaluation goes by the cosines.

    Args:
        run, class_beta, reweight_epoch: see `DeferredReweighting`.
    """

    def __init__(
        self, run: MethodRun, class_beta: float = 0.9999, reweight_epoch: int = 160
    ) -> None:
        super().__init__(run, class_beta, reweight_epoch)
        margins = checked_counts(run.class_counts) ** -0.25
        margins = (margins * (MAX_MARGIN / margins.max())).to(self.log_prior)
        self.margins = nn.Buffer(margins, persistent=False)

    @property
    def head(self) -> nn.Linear:
        """The cosines, scaled."""
        return CosineLinear(self._learner.classifier.head)

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The weighted mean over the batch."""
        logits = cosine_logits(features, weight.to(features.dtype))
        margins = SCALE * self.margins[labels, None].to(logits.dtype)
        return self.weighted_mean(logits.scatter_add(1, labels[:, None], -margins), labels)

    def cross_entropy(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """CE of the cosines: what evaluation goes by is trained before the margins come, too."""
        return F.cross_entropy(cosine_logits(features, weight.to(features.dtype)), labels)


@dataclass(frozen=True)
class LDAMOptions(DeferredReweightingOptions):
    """LDAM-DRW (Cao et al., NeurIPS 2019)."""

    own_cross_entropy: ClassVar[bool] = True

    def build(self, run: MethodRun) -> LDAM:
        return LDAM(run, self.class_beta, self.reweight_epoch(run))
