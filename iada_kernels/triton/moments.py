"""Class means of a batch, the streaming mean, and the streaming variances of a diagonal Σ.

With w = m/(n + m), X the rows of class c and μ′ their mean,

    shift = μ′ − μ ;   μ ← μ + w shift
    σ ← (1−w) σ + (w/m) Σ (X − μ′)² + w(1−w) shift²        (diagonal Σ only)

μ′ is a sum corrected by the mean of its residuals, so that large float32 means do not cancel.
features (N, A) any float · mean, center = μ′, shift (C, A) · covariance (C, A) or None.
Classes without rows: nothing is read or written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import load_tile
from iada_kernels.triton.launch import compute_type, current_configuration, launch
from iada_kernels.triton.rows import Groups


@triton.jit
def class_mean(
    features, stride, order, m, cols, col_mask,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The mean of features[order[:m], columns], with m > 0."""
    total = tl.zeros([BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_M):
        at = k + tl.arange(0, BLOCK_M)
        rows = tl.load(order + at, mask=at < m, other=0)
        total += tl.sum(load_tile(features, rows, stride, cols, at < m, col_mask, ACC), axis=0)
    rough = total / m
    total = tl.zeros([BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_M):
        at = k + tl.arange(0, BLOCK_M)
        rows = tl.load(order + at, mask=at < m, other=0)
        x = load_tile(features, rows, stride, cols, at < m, col_mask, ACC)
        total += tl.sum(tl.where((at < m)[:, None], x - rough[None, :], 0.0), axis=0)
    return rough + total / m


@triton.jit
def moments_kernel(
    features, stride, order, start, size, batch_weight, mean, center, shift, covariance, A,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    m = tl.load(size + c)
    if m == 0:
        return
    first = tl.load(start + c)
    cols = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    col_mask = cols < A
    batch_mean = class_mean(
        features, stride, order + first, m, cols, col_mask, BLOCK_M, BLOCK_A, ACC
    )

    offs = c.to(tl.int64) * A + cols
    w = tl.load(batch_weight + c)
    old = tl.load(mean + offs, mask=col_mask, other=0.0)
    mean_shift = batch_mean - old
    tl.debug_barrier()  # several threads may read what one of them writes now
    tl.store(center + offs, batch_mean, mask=col_mask)
    tl.store(shift + offs, mean_shift, mask=col_mask)
    tl.store(mean + offs, old + w * mean_shift, mask=col_mask)
    if covariance is not None:
        total = tl.zeros([BLOCK_A], dtype=ACC)
        for k in range(0, m, BLOCK_M):
            at = k + tl.arange(0, BLOCK_M)
            rows = tl.load(order + first + at, mask=at < m, other=0)
            x = load_tile(features, rows, stride, cols, at < m, col_mask, ACC)
            x = tl.where((at < m)[:, None], x - batch_mean[None, :], 0.0)
            total += tl.sum(x * x, axis=0)
        sigma = tl.load(covariance + offs, mask=col_mask, other=0.0)
        spread = total / m + (1 - w) * mean_shift * mean_shift
        tl.store(covariance + offs, (1 - w) * sigma + w * spread, mask=col_mask)


def update_moments(
    features: Tensor, groups: Groups, mean: Tensor, covariance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """μ in place, variances too if given; returns center and shift (C, A). One launch."""
    tile = current_configuration(features.device).moments
    num_classes, width = mean.shape
    center, shift = torch.empty_like(mean), torch.empty_like(mean)
    launch(
        moments_kernel,
        (num_classes, triton.cdiv(width, tile.columns)),
        features, features.stride(0), groups.order, groups.start, groups.size, groups.batch_weight,
        mean, center, shift, covariance, width,
        warps=tile.warps, stages=tile.stages,
        BLOCK_M=tile.rows, BLOCK_A=tile.columns,
        ACC=compute_type(mean.dtype),
    )  # fmt: skip
    return center, shift
