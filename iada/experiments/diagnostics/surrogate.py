"""How far the surrogate of Eq. 5 lies above the loss it stands for, Eq. 2, by sampling.

Eq. 2 is the expected CE over h̃ ~ N(h + δ, αΣ_y); Jensen's inequality turns it into Eq. 5, CE at
z̃ = w·(h + δ) + b + αρ. CE depends on h̃ through the differences of logits to the true class's
only, (W − 1w_y) h̃ + b − b_y, Gaussian with the covariance α F Fᵀ where F = (W − 1w_y) Σ_y^½: these
are sampled, C numbers a draw instead of A.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iada.utils.autocast import full_precision
from iada.utils.checks import (
    argument_error,
    check_count,
    check_finite,
    check_label_values,
    check_loss_arguments,
)
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.low_rank import unfolded
from iada_kernels.torch_ops.loss import perturbation_sign

CHUNK = 2**22  # numbers drawn at a time: 32 MiB of float64


@dataclass(frozen=True)
class SurrogateGap:
    """Both sides of the inequality for the U classes that have rows; (U) float64 on the CPU.

    classes: their indices, int64. rows: samples of each, int64. expected: Eq. 2 as sampled, the
    mean over the class's rows, in nats. standard_error: of `expected`, from the spread of the
    draws. bound: Eq. 5. negative: the part of Σ_c, of its eigenvalues' absolute sum, that was
    negative and taken as 0 on both sides: a Gaussian has none.

    Per class without the weight 1/π_c, which `overall` applies.
    """

    classes: Tensor
    rows: Tensor
    expected: Tensor
    standard_error: Tensor
    bound: Tensor
    negative: Tensor

    @property
    def gap(self) -> Tensor:
        """bound − expected, (U), at least 0 but for the sampling error."""
        return self.bound - self.expected

    def overall(self, class_counts: Tensor) -> dict[str, float]:
        """expected, bound, gap and standard_error over all rows, each weighted by 1/π_y.

        class_counts: training samples of each class, (C). The weights are divided by their sum, as
        in Eq. 1.
        """
        counts = class_counts.double().cpu()[self.classes]
        if not (counts > 0).all():
            absent = int(self.classes[(counts <= 0).nonzero()[0, 0]])
            remedy = "count the data that the model was trained on"
            expected = "samples of each class"
            raise argument_error("class_counts", expected, f"0 of class {absent}", remedy)
        weight = self.rows / counts
        weight = weight / weight.sum()
        return {
            "expected": float(weight @ self.expected),
            "bound": float(weight @ self.bound),
            "gap": float(weight @ self.gap),
            "standard_error": math.sqrt(float(weight.square() @ self.standard_error.square())),
        }

    def as_record(self) -> dict[str, list[Any]]:
        """Plain lists, one entry a class, for the record of a run."""
        names = ("classes", "rows", "expected", "bound", "gap", "standard_error", "negative")
        return {name: getattr(self, name).tolist() for name in names}


@torch.no_grad()
def surrogate_gap(
    inputs: LossInputs, *, alpha: float = 0.5, samples: int = 1000, seed: int = 0
) -> SurrogateGap:
    """Monte-Carlo check of Eq. 2 ≤ Eq. 5 on the features of a fitted model.

    Computed in float64. Memory beside the arguments is bounded: CHUNK draws, and one class's Σ.

    Args:
        inputs: as of `iada.fused_loss`, with a covariance; every label is a class.
        alpha: of Eq. 6, not negative.
        samples: draws of h̃ for each row, at least 2.
        seed: of the draws.

    Raises ValueError for an argument that does not fit.
    """
    check_loss_arguments(inputs, LossOptions(alpha))
    _check_values(inputs, alpha, samples)
    assert inputs.covariance is not None
    labels = inputs.labels.long()
    generator = torch.Generator(labels.device).manual_seed(seed)
    found = []
    with full_precision(labels.device):
        head = inputs.weight.double()
        for c in labels.unique().tolist():
            rows = (labels == c).nonzero()[:, 0]
            centre = _logit_differences(inputs, c, rows)
            sigma = unfolded(inputs.covariance[c : c + 1], head.shape[1])[0]
            factor, negative = _factor(head - head[c], sigma.double())
            factor = factor * math.sqrt(alpha)
            bound = (centre + 0.5 * factor.square().sum(dim=1)).logsumexp(dim=1)
            mean, variance = _expected(centre, factor, samples, generator)
            error = (variance.sum() / samples).sqrt() / len(rows)
            found.append((c, len(rows), mean.mean(), error, bound.mean(), negative))
    columns = [[float(entry) for entry in column] for column in zip(*found, strict=True)]
    table = torch.tensor(columns, dtype=torch.float64)
    return SurrogateGap(table[0].long(), table[1].long(), *table[2:])


def _expected(
    centre: Tensor, factor: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean and variance, (n) each, of log Σ_j exp(centre + F ξ)_j over draws of ξ ~ N(0, 1)."""
    start = centre.logsumexp(dim=1)  # draws are summed up as differences to it, without cancelling
    total, squares = torch.zeros_like(start), torch.zeros_like(start)
    size = max(1, CHUNK // centre.numel())
    for first in range(0, samples, size):
        draws = min(size, samples - first)
        shape = (draws, len(centre), factor.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=centre.dtype, device=centre.device)
        change = (centre + noise @ factor.T).logsumexp(dim=2) - start
        total += change.sum(dim=0)
        squares += change.square().sum(dim=0)
    mean = total / samples
    variance = (squares - samples * mean.square()) / (samples - 1)
    return start + mean, variance.clamp(min=0)


def _logit_differences(inputs: LossInputs, label: int, rows: Tensor) -> Tensor:
    """(w_j − w_y)·(h + ε s) + b_j − b_y, (n, C), for these rows, of one class."""
    weight = inputs.weight.double()
    features, offset = perturbed(inputs, rows), _offset(inputs)
    return features @ (weight - weight[label]).T + (offset - offset[label])


def perturbed(inputs: LossInputs, rows: Tensor) -> Tensor:
    """h + ε s of these rows, (n, A) float64; h itself without ε."""
    features, weight = inputs.features[rows].double(), inputs.weight.double()
    if inputs.epsilon is None:
        return features
    logits = features @ weight.T + _offset(inputs)
    direction = perturbation_sign(logits, weight, inputs.labels[rows, None].long())
    return features + inputs.epsilon[rows, None].double() * direction


def _offset(inputs: LossInputs) -> Tensor:
    """The head's bias, (C) float64; 0 without."""
    weight = inputs.weight
    return weight.new_zeros(len(weight)).double() if inputs.bias is None else inputs.bias.double()


def _factor(difference: Tensor, sigma: Tensor) -> tuple[Tensor, float]:
    """F with F Fᵀ = Δ Σ Δᵀ, (C, r), r ≤ C, and the share of Σ that was negative.

    difference Δ (C, A), sigma (A, A) or its diagonal (A).
    """
    if sigma.dim() == 1:
        values = sigma
        factor = difference * sigma.clamp(min=0).sqrt()
    else:
        values, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)
        rounding = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
        kept = values > rounding
        factor = difference @ (vectors[:, kept] * values[kept].sqrt())
    if factor.shape[1] > len(factor):  # F = L Q with orthonormal rows of Q: Q ξ is ~ N(0, 1) too
        factor = torch.linalg.qr(factor.T, mode="r").R.T
    total = float(values.abs().sum())
    return factor, float(values.clamp(max=0).abs().sum()) / total if total else 0.0


def _check_values(inputs: LossInputs, alpha: float, samples: int) -> None:
    if inputs.covariance is None:
        raise argument_error("covariance", "Σ of each class", "None", "pass that of the training")
    if len(inputs.features) == 0:
        remedy = "pass the features of some samples"
        raise argument_error("features", "at least one row", "none", remedy)
    if alpha < 0:
        remedy = "αΣ is a covariance: pass the α of training"
        raise argument_error("alpha", "0 or more", repr(alpha), remedy)
    check_count("samples", samples, 2, "1000 is usual")
    check_label_values(inputs.labels.long(), len(inputs.weight), None)
    for name in ("features", "weight", "covariance"):
        check_finite(name, getattr(inputs, name), "look for what diverged in training")
