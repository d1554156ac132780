"""Features as Meta-IADA moves them, and the training samples whose features lie nearest.

δ = ε s with s = sign(∇_h CE) is the adversarial part of Eq. 2; h̃ ~ N(h + δ, αΣ_y) its Gaussian.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from iada.experiments.diagnostics.surrogate import perturbed
from iada.utils.checks import argument_error, check_count, check_loss_arguments
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.low_rank import unfolded, variances


@torch.no_grad()
def moved_features(
    inputs: LossInputs, *, alpha: float, draws: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """h and h + ε s, (N, 2, A), and `draws` of N(h + ε s, αΣ_y), (N, draws, A): float64.

    A negative eigenvalue of Σ, which a step of Eq. 9 can leave, is taken as 0.

    Args:
        inputs: as of `iada.fused_loss`, with a covariance and ε; every label is a class.
        alpha: of Eq. 6, not negative.
        draws: for each row.
        seed: of the draws.
    """
    check_loss_arguments(inputs, LossOptions(alpha))
    check_count("draws", draws, 0, "2 are usual")
    for name in ("covariance", "epsilon"):
        if getattr(inputs, name) is None:
            raise argument_error(name, "that of the training", "None", "pass it")
    assert inputs.covariance is not None
    features, labels = inputs.features.double(), inputs.labels.long()
    centre = perturbed(inputs, torch.arange(len(features), device=features.device))
    generator = torch.Generator(features.device).manual_seed(seed)
    noise = torch.randn(
        (len(features), draws, features.shape[1]),
        generator=generator,
        dtype=features.dtype,
        device=features.device,
    )
    drawn = centre[:, None].expand_as(noise).clone()
    for c in labels.unique().tolist():
        rows = labels == c
        sigma = unfolded(inputs.covariance[c : c + 1], features.shape[1])[0].double()
        if sigma.dim() == 1:
            sigma = torch.diag(sigma)
        values, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)
        root = vectors * values.clamp(min=0).sqrt()
        drawn[rows] += math.sqrt(alpha) * noise[rows] @ root.mT
    return torch.stack([features, centre], dim=1), drawn


def class_radii(covariance: Tensor, width: int) -> Tensor:
    """√tr Σ_c of each class, (C) float64 in units of the features: how far its samples lie from
    its mean, as a root mean square. Σ of any structure, for features (N, width)."""
    return variances(covariance, width).double().sum(dim=1).clamp(min=0).sqrt()


class Neighbours(NamedTuple):
    """Of M targets: the `count` samples nearest to each but its own, (M, count), nearest first.

    own_distance: to the own sample, (M). own_rank: other samples that are nearer, (M).
    """

    rows: Tensor
    distances: Tensor
    own_distance: Tensor
    own_rank: Tensor


@torch.no_grad()
def neighbours(features: Tensor, targets: Tensor, own: Tensor, count: int) -> Neighbours:
    """features (N, A), targets (M, A); own: the sample that each target was made of, (M)."""
    if not 0 < count < len(features):
        expected = f"1 to {len(features) - 1} other samples"
        raise argument_error("count", expected, count, "pass fewer, or more features")
    mode = "donot_use_mm_for_euclid_dist"  # a product of matrices would cancel where it is near
    distances = torch.cdist(targets.double(), features.double(), compute_mode=mode)
    own_distance = distances.gather(1, own[:, None])[:, 0].clone()
    distances.scatter_(1, own[:, None], torch.inf)
    found = distances.topk(count, dim=1, largest=False)
    rank = (distances < own_distance[:, None]).sum(dim=1)
    return Neighbours(found.indices, found.values, own_distance, rank)
