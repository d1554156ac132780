"""LDAM-DRW: margins by class size on normalised features, and deferred re-weighting.

Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019:

    z_j  = s (cos(h, w_j) − Δ_j [j = y]),   Δ_c ∝ n_c^(−1/4), the largest one ½,   s = 30
    loss = Σ ω_y CE(z, y) / Σ ω_y

with ω = 1 until the re-weighting, from then on `class_balanced_weights`. As in their published code
the weighted sum is divided by the sum of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from iada.methods.head_loss import HeadLossMethod
from iada.methods.options import MethodOptions, MethodRun
from iada.nn.priors import checked_counts, class_balanced_weights
from iada.utils.settings import setting

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


class LDAM(HeadLossMethod):
    """See above. The head's bias is not used and stays as it is; evaluation goes by the cosines.

    Args:
        run: what it is built for.
        class_beta: β of the weights after re-weighting sets in.
        reweight_epoch: from which epoch on that is; 160 of 200 in the paper.
    """

    class_weights: Tensor
    margins: Tensor

    def __init__(
        self, run: MethodRun, class_beta: float = 0.9999, reweight_epoch: int = 160
    ) -> None:
        super().__init__(run)
        margins = checked_counts(run.class_counts) ** -0.25
        margins = (margins * (MAX_MARGIN / margins.max())).to(self.log_prior)
        self.register_buffer("margins", margins, persistent=False)
        weights = class_balanced_weights(run.class_counts, class_beta)
        self.register_buffer("class_weights", weights.to(self.log_prior), persistent=False)
        self.reweight_epoch = reweight_epoch
        self.reweights = False

    @property
    def head(self) -> nn.Linear:
        """The cosines, scaled."""
        return CosineLinear(self._learner.classifier.head)

    def begin_epoch(
        self, epoch: int, order: Sequence[list[int]], first_step: int
    ) -> Sequence[list[int]]:
        """The rows as they are; looks whether it is time for the weights."""
        self.reweights = epoch >= self.reweight_epoch
        return order

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The weighted mean over the batch."""
        logits = cosine_logits(features, weight.to(features.dtype))
        margins = SCALE * self.margins[labels, None].to(logits.dtype)
        logits = logits.scatter_add(1, labels[:, None], -margins)
        weights = self.class_weights.to(logits.dtype) if self.reweights else None
        return F.cross_entropy(logits, labels, weights)

    def cross_entropy(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """CE of the cosines: what evaluation goes by is trained before the margins come, too."""
        return F.cross_entropy(cosine_logits(features, weight.to(features.dtype)), labels)


@dataclass(frozen=True)
class LDAMOptions(MethodOptions):
    """LDAM-DRW (Cao et al., NeurIPS 2019).

    class_beta: β of the class-balanced weights.
    reweight_from: fraction of the epochs after which classes are weighed; 160 of 200.
    """

    own_cross_entropy: ClassVar[bool] = True
    class_beta: float = setting(0.9999, least=0, below=1)
    reweight_from: float = setting(0.8, least=0, most=1)

    @property
    def counts_epochs(self) -> bool:
        return True

    def build(self, run: MethodRun) -> LDAM:
        epoch = round(self.reweight_from * run.epochs)
        return LDAM(run, self.class_beta, epoch)
