"""The unit that the ε is measured in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from iada.utils.checks import check_choice, refusal

EPSILON_UNITS = ("feature", "class-deviation")


@dataclass(frozen=True)
class EpsilonScale:
    """ε = factor · u_y · tanh(…), with u_y constant in every derivative.

    With |ε| = 1 a feature moves by √A in length, which in the features of trained ResNets is four
    to eight times the root mean square radius √(tr Σ_y) of a class. unit "class-deviation" is
    u_y = √(tr Σ_y / A), so that tanh = 1 moves it by one such radius; "feature" is u_y = 1.
    """

    factor: float = 1.0
    unit: str = "feature"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            remedy = "epsilon=0.0 is without a perturbation"
            raise refusal("epsilon_scale", "a number above 0", repr(self.factor), remedy)
        check_choice("epsilon_unit", self.unit, EPSILON_UNITS)

    @torch.no_grad()
    def at(self, covariance: Tensor, labels: Tensor) -> Tensor | float:
        """The scale of each sample, (N), or of all: covariance (C, A, A) or (C, A), labels (N)."""
        if self.unit == "feature":
            return self.factor
        variances = covariance.diagonal(dim1=1, dim2=2) if covariance.dim() == 3 else covariance
        return self.factor * variances.mean(dim=1).clamp(min=0).sqrt()[labels]
