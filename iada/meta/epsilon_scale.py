"""The unit that the strengths ε are measured in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from iada.utils.checks import complain

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
            raise complain("epsilon_scale", "a number above 0", repr(self.factor), remedy)
        if self.unit not in EPSILON_UNITS:
            wanted = f"one of {', '.join(map(repr, EPSILON_UNITS))}"
            raise complain("epsilon_unit", wanted, repr(self.unit), "pass one of these")

    @torch.no_grad()
    def at(self, covariance: Tensor, labels: Tensor) -> Tensor | float:
        """The scale of each sample, (N), or of all: covariance (C, A, A) or (C, A), labels (N)."""
        if self.unit == "feature":
            return self.factor
        variances = covariance.diagonal(dim1=1, dim2=2) if covariance.dim() == 3 else covariance
        return self.factor * variances.mean(dim=1).clamp(min=0).sqrt()[labels]


def scaled_epsilon(epsilon: Tensor | None, scale: Tensor | float) -> Tensor | None:
    """ε (N) in units of the features, with its graph; None stays None."""
    if epsilon is None or (isinstance(scale, float) and scale == 1.0):
        return epsilon
    return epsilon * scale
