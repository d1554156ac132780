"""Class means of a batch, the streaming mean, and the streaming variances of a diagonal Σ.

With w = m/(n + m), X the rows of class c and μ′ their mean,

    shift = μ′ − μ ;   μ ← μ + w shift
    σ ← (1−w) σ + (w/m) Σ (X − μ′)² + w(1−w) shift²        (diagonal Σ only)

μ′ is a sum corrected by the mean of its residuals, so that large float32 means do not cancel.
features (N, A) any float · mean, center = μ′, shift (C, A) · covariance (C, A) or None.
Classes without rows: nothing is read or written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import (
    load_tile,
    tile_at,
    wait_for_memory,
)


@triton.jit
def class_mean(
    samples, order, m, cols, col_mask,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The mean of h[order[:m], columns], with m > 0."""
    total = tl.zeros([BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_M):
        at = k + tl.arange(0, BLOCK_M)
        rows = tl.load(order + at, mask=at < m, other=0)
        x = load_tile(samples.features, rows, samples.stride, cols, at < m, col_mask, ACC)
        total += tl.sum(x, axis=0)
    rough = total / m
    total = tl.zeros([BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_M):
        at = k + tl.arange(0, BLOCK_M)
        rows = tl.load(order + at, mask=at < m, other=0)
        x = load_tile(samples.features, rows, samples.stride, cols, at < m, col_mask, ACC)
        total += tl.sum(tl.where((at < m)[:, None], x - rough[None, :], 0.0), axis=0)
    return rough + total / m


class Moments(NamedTuple):
    """The mean μ, updated in place; μ′ of the batch and its shift from the old μ; (C, A) each.

    batch_weight (C) is w, which `rows.group_class` gives.
    """

    mean: Tensor
    center: Tensor
    shift: Tensor
    batch_weight: Tensor

    @classmethod
    def of(cls, mean: Tensor) -> "Moments":
        """For `update_class` to fill."""
        batch_weight = mean.new_empty(mean.shape[0])
        return cls(mean, torch.empty_like(mean), torch.empty_like(mean), batch_weight)


@triton.jit
def update_class(
    samples, groups, moments, covariance, c, column, A,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of columns of class c, and of its variances where `covariance` is given."""
    m = tl.load(groups.size + c)
    if m > 0:
        order = groups.order + tl.load(groups.start + c)
        cols, col_mask = tile_at(column, BLOCK_A, A)
        batch_mean = class_mean(samples, order, m, cols, col_mask, BLOCK_M, BLOCK_A, ACC)

        offs = c.to(tl.int64) * A + cols
        w = tl.load(moments.batch_weight + c)
        old = tl.load(moments.mean + offs, mask=col_mask, other=0.0)
        mean_shift = batch_mean - old
        wait_for_memory()
        tl.debug_barrier()  # several threads may read what one of them writes now
        tl.store(moments.center + offs, batch_mean, mask=col_mask)
        tl.store(moments.shift + offs, mean_shift, mask=col_mask)
        tl.store(moments.mean + offs, old + w * mean_shift, mask=col_mask)
        if covariance is not None:
            total = tl.zeros([BLOCK_A], dtype=ACC)
            for k in range(0, m, BLOCK_M):
                at = k + tl.arange(0, BLOCK_M)
                rows = tl.load(order + at, mask=at < m, other=0)
                x = load_tile(samples.features, rows, samples.stride, cols, at < m, col_mask, ACC)
                x = tl.where((at < m)[:, None], x - batch_mean[None, :], 0.0)
                total += tl.sum(x * x, axis=0)
            sigma = tl.load(covariance + offs, mask=col_mask, other=0.0)
            spread = total / m + (1 - w) * mean_shift * mean_shift
            tl.store(covariance + offs, (1 - w) * sigma + w * spread, mask=col_mask)
