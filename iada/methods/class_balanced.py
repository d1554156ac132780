"""Class-Balanced CE and Focal: losses weighted by the effective number of samples."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.learner import linear
from iada.methods.head_loss import HeadLossMethod
from iada.methods.options import MethodOptions, MethodRun
from iada.nn.priors import class_balanced_weights
from iada.utils.settings import setting


class ClassBalanced(HeadLossMethod):
    """(1/n) Σ ω_y (1 − p_y)^γ CE(z, y), with p = softmax(z) and ω by `class_balanced_weights`.

    Cui et al., CVPR 2019: γ = 0 is their CB-CE. Their focal term is on C sigmoids; this is the
    softmax form that Cao et al. (NeurIPS 2019) and later long-tail work compare with, there with
    γ = 1. As in Cui et al. the weighted sum is divided by n, not by the sum of the weights.

    Args:
        run: what it is built for.
        class_beta: β of the weights.
        focal_gamma: γ.
    """

    def __init__(
        self, run: MethodRun, class_beta: float = 0.9999, focal_gamma: float = 0.0
    ) -> None:
        super().__init__(run)
        weights = class_balanced_weights(run.class_counts, class_beta)
        self.class_weights = nn.Buffer(weights.to(self.log_prior), persistent=False)
        self.focal_gamma = focal_gamma

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        log_p = linear(features, weight, bias).log_softmax(dim=1)
        losses = F.nll_loss(log_p, labels, reduction="none")
        if self.focal_gamma:
            # 1 − p_y as the sum of the others keeps the digits of a confident sample.
            rest = log_p.exp().scatter(1, labels[:, None], 0.0).sum(dim=1)
            # x^γ has no derivative at 0 for γ below 1, and 0 is what p_y rounds to there.
            tiny = torch.finfo(rest.dtype).tiny
            losses = losses * rest.clamp(min=tiny) ** self.focal_gamma
        return (losses * self.class_weights[labels]).mean()


@dataclass(frozen=True)
class ClassBalancedOptions(MethodOptions):
    """Class-Balanced CE (Cui et al., CVPR 2019).

    class_beta: β of the class-balanced weights.
    """

    class_beta: float = setting(0.9999, least=0, below=1)

    def build(self, run: MethodRun) -> ClassBalanced:
        return ClassBalanced(run, **asdict(self))


@dataclass(frozen=True)
class FocalOptions(ClassBalancedOptions):
    """Class-Balanced Focal.

    focal_gamma: γ.
    """

    focal_gamma: float = setting(1.0, least=0)
