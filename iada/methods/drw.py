"""Deferred re-weighting: CE, from an epoch on with class-balanced weights.

CE-DRW of Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
NeurIPS 2019: Σ ω_y CE(z, y) / Σ ω_y with ω = 1 until the re-weighting, from then on
`class_balanced_weights`. As in their published code the weighted sum is divided by the sum of the
weights, and the rest of the schedule is CE's.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.learner import linear
from iada.meta.method import Order
from iada.methods.head_loss import HeadLossMethod
from iada.methods.options import MethodOptions, MethodRun
from iada.nn.priors import class_balanced_weights
from iada.utils.settings import setting


class DeferredReweighting(HeadLossMethod):
    """See above.

    Args:
        run: what it is built for.
        class_beta: β of the weights after re-weighting sets in.
        reweight_epoch: from which epoch on that is; 160 of 200 in the paper.
    """

    def __init__(
        self, run: MethodRun, class_beta: float = 0.9999, reweight_epoch: int = 160
    ) -> None:
        super().__init__(run)
        weights = class_balanced_weights(run.class_counts, class_beta)
        self.class_weights = nn.Buffer(weights.to(self.log_prior), persistent=False)
        self.reweight_epoch = reweight_epoch
        self.reweights = False

    def begin_epoch(self, epoch: int, order: Order, first_step: int) -> Order:
        """The rows as they are; looks whether it is time for the weights."""
        self.reweights = epoch >= self.reweight_epoch
        return order

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The weighted mean over the batch."""
        return self.weighted_mean(linear(features, weight, bias), labels)

    def weighted_mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of CE, with the weights of this epoch."""
        weights = self.class_weights.to(logits.dtype) if self.reweights else None
        return F.cross_entropy(logits, labels, weights)


@dataclass(frozen=True)
class DeferredReweightingOptions(MethodOptions):
    """CE-DRW (Cao et al., NeurIPS 2019).

    class_beta: β of the class-balanced weights.
    reweight_from: fraction of the epochs after which classes are weighed; 160 of 200.
    """

    class_beta: float = setting(0.9999, least=0, below=1)
    reweight_from: float = setting(0.8, least=0, most=1)

    @property
    def counts_epochs(self) -> bool:
        return True

    def reweight_epoch(self, run: MethodRun) -> int:
        """From which epoch on classes are weighed."""
        return round(self.reweight_from * run.epochs)

    def build(self, run: MethodRun) -> DeferredReweighting:
        return DeferredReweighting(run, self.class_beta, self.reweight_epoch(run))
