"""The streaming class covariance: population convention, all history weighted equally.

For a class with m rows in the batch, w = m/(n+m), batch mean μ′ and centred rows X,

    Σ ← (1−w) Σ + (w/m) XᵀX + w(1−w)(μ−μ′)(μ−μ′)ᵀ ;   μ ← μ + w(μ′−μ) ;   n ← n+m

Rows are centred on their batch mean before any product, so that large means do not cancel.
"""

import torch
from torch import Tensor

from iada_kernels.low_rank import is_low_rank, unfolded
from iada_kernels.torch_ops.blocking import blocks
from iada_kernels.torch_ops.low_rank_update import low_rank_update
from iada_kernels.triangular import is_triangular, triangles


def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    """One batch, in place on covariance (any structure), mean (C, A) and count (C) int64.

    features (N, A) and labels (N) int64 are read only. A row with a label outside [0, C) is left
    out; a class absent from the batch keeps its bits. No synchronisation on an accelerator; on
    a CPU, rows are grouped by class.
    """
    num_classes, width = mean.shape
    features = features.to(mean.dtype)
    # One class more, for the rows that are left out.
    labels = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    size = count.new_zeros(num_classes + 1).index_add_(0, labels, torch.ones_like(labels))
    divisor = size.clamp(min=1)[:, None].to(mean.dtype)
    sums = mean.new_zeros(num_classes + 1, width)
    batch_mean = sums.index_add(0, labels, features) / divisor
    # A second pass over the residuals recovers what one float32 sum of large features loses.
    batch_mean += sums.index_add(0, labels, features - batch_mean[labels]) / divisor
    centred = features - batch_mean[labels]
    # 0 times a NaN is NaN: products with a mask do not leave out a row that is not finite.
    centred.masked_fill_((labels == num_classes)[:, None], 0.0)

    present, batch_mean, divisor = size[:-1], batch_mean[:-1], divisor[:-1]
    w = (present.to(mean.dtype) / (count + present).clamp(min=1))[:, None]
    shift = batch_mean - mean
    if is_low_rank(covariance, width):
        low_rank_update(covariance, centred, labels, size, w, shift)
    elif covariance.dim() == 2:
        spread = sums.index_add(0, labels, centred * centred)[:-1] / divisor
        # Not Σ += w (Σ′ − Σ): of a small Σ′ that takes the place of a large Σ it keeps no digit.
        covariance.mul_(1 - w).add_(w * (spread + (1 - w) * shift * shift))
    elif covariance.device.type == "cpu":
        _update_full_grouped(covariance, centred, labels, size, w, shift)
    else:
        _update_full_masked(covariance, centred, labels, divisor, w, shift)
    mean += w * shift
    count += present


def _update_full_grouped(
    covariance: Tensor, centred: Tensor, labels: Tensor, size: Tensor, w: Tensor, shift: Tensor
) -> None:
    """One rank-(m+1) product for each class that is present: N·A² multiplications in all."""
    groups = centred[labels.argsort(stable=True)].split(size.tolist())
    for c, (batch_weight, group) in enumerate(zip(w[:, 0].tolist(), groups[:-1], strict=True)):
        if len(group):
            sigma = unfolded(covariance[c : c + 1], shift.shape[1])[0]
            sigma.addmm_(group.T, group, beta=1 - batch_weight, alpha=batch_weight / len(group))
            sigma.addr_(shift[c], shift[c], alpha=batch_weight * (1 - batch_weight))
            if is_triangular(covariance, shift.shape[1]):
                covariance[c] = triangles(sigma[None])[0]


def _update_full_masked(
    covariance: Tensor, centred: Tensor, labels: Tensor, divisor: Tensor, w: Tensor, shift: Tensor
) -> None:
    """The same with shapes that do not depend on the labels: C·N·A² multiplications."""
    num_classes, width = shift.shape
    for classes in blocks(num_classes, width * max(len(labels), width)):
        index = torch.arange(classes.start, classes.stop, device=labels.device)
        mask = (labels == index[:, None]).to(centred.dtype)
        spread = (centred * mask[:, :, None]).mT @ centred
        spread /= divisor[classes, :, None]
        step = shift[classes]
        spread.baddbmm_(((1 - w[classes]) * step)[:, :, None], step[:, None, :])
        batch_weight = w[classes, :, None]
        if is_triangular(covariance, width):
            spread = triangles(spread)
        covariance[classes] = (1 - batch_weight) * covariance[classes] + batch_weight * spread
