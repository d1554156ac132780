"""The methods that need no meta set: CE, Logit Adjustment and ISDA, all on `fused_loss`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from iada.meta.method import Method
from iada.methods.options import CovarianceOptions, MethodOptions, MethodRun
from iada.nn.class_covariance import ClassCovariance
from iada.nn.functional import fused_loss
from iada.nn.priors import log_class_prior


class HeadLossMethod(Method):
    """One optimizer step a batch on a loss of the head; here on a special case of Eq. 6.

    covariance None and beta 0 is CE; covariance None and beta 1 is Logit Adjustment (Balanced
    Softmax); a covariance and beta 0 is ISDA, whose alpha is to be ramped.

    Args:
        run: what it is built for.
        covariance: a `ClassCovariance`, or None.
        alpha, beta: of Eq. 6; plain attributes.
    """

    def __init__(
        self,
        run: MethodRun,
        *,
        covariance: ClassCovariance | None = None,
        alpha: float = 0.5,
        beta: float = 0.0,
    ) -> None:
        super().__init__(**run.arguments)
        log_prior = log_class_prior(run.class_counts, run.head.out_features)
        log_prior = log_prior.to(run.head.weight.device, run.dtype)
        self.log_prior = nn.Buffer(log_prior, persistent=False)
        self.covariance = covariance
        self.alpha, self.beta = alpha, beta

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The method's loss () of the head on features (N, A)."""
        if self.covariance is not None:
            self.covariance.update_gathered(features, labels)
        terms: dict[str, Any] = {"covariance": self.covariance, "log_prior": self.log_prior}
        return fused_loss(features, weight, bias, labels, **terms, alpha=self.alpha, beta=self.beta)


@dataclass(frozen=True)
class CrossEntropyOptions(MethodOptions):
    """Plain cross-entropy; no options."""

    def build(self, run: MethodRun) -> HeadLossMethod:
        return HeadLossMethod(run)


@dataclass(frozen=True)
class LogitAdjustmentOptions(MethodOptions):
    """Logit Adjustment (Menon et al., ICLR 2021).

    beta: of Eq. 6, the factor of log π.
    """

    beta: float = 1.0

    def build(self, run: MethodRun) -> HeadLossMethod:
        return HeadLossMethod(run, beta=self.beta)


@dataclass(frozen=True)
class ISDAOptions(CovarianceOptions):
    """ISDA (Wang et al., NeurIPS 2019)."""

    def build(self, run: MethodRun) -> HeadLossMethod:
        covariance = run.covariance(self.structure, self.rank, self.shrinkage)
        return HeadLossMethod(run, covariance=covariance, alpha=self.alpha)
