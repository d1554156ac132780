"""What flows back through the class pass to W, without keeping (W − 1w_c) Σ_c.

With G = ∂L/∂R (C, C), Δ_j = w_j − w_c and m_c = Σ_j G_cj Δ_j,

    ∂L/∂W_j = Σ_c (G_cj Δ_j − [j = c] m_c) · ½ (Σ_c + Σ_cᵀ)
    ∂L/∂Σ_c = ½ Σ_j G_cj Δ_j Δ_jᵀ                             `class_pass.add_pair_terms`, fresh

A program owns a tile (classes j, columns i) of ∂L/∂W and adds over its share of the pairs
(class c, columns k); shares (S, C, A) are added by the kernel of the head's ∂L/∂W.

G itself is a sum over the samples of each class, G_cj = α Σ_{i: y_i = c} g_i D_ij: the product of
the one-hot labels and D, cut into shares along the batch.
"""

import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import load_labels, load_tile, number
from iada_kernels.triton.launch import (
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    split,
)


@triton.jit
def class_pass_weight_kernel(
    covariance, weight, curvature, size, shares, C, A, per_share,
    BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    columns = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    share = tl.program_id(2)
    there, inside = j < C, columns < A
    steps = tl.cdiv(A, BLOCK_K)
    total = tl.zeros([BLOCK_J, BLOCK_A], dtype=ACC)
    last = tl.minimum((share + 1) * per_share, C * steps)
    for item in range(share * per_share, last):
        c = (item // steps).to(tl.int64)
        if tl.load(size + c) > 0:
            k = (item % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
            deep = k < A
            own = tl.load(weight + c * A + k, mask=deep, other=0.0)
            g = tl.load(curvature + c * C + j, mask=there, other=0.0)
            delta = load_tile(weight, j, A, k, there, deep, ACC) - own[None, :]
            row = tl.where(there[:, None], g[:, None] * delta, 0.0)
            if C <= BLOCK_J:
                m = tl.sum(row, axis=0)
            else:
                m = tl.zeros([BLOCK_K], dtype=ACC)
                for first in range(0, C, BLOCK_J):
                    all_j = first + tl.arange(0, BLOCK_J)
                    all_g = tl.load(curvature + c * C + all_j, mask=all_j < C, other=0.0)
                    all_delta = load_tile(weight, all_j, A, k, all_j < C, deep, ACC)
                    m += tl.sum(all_g[:, None] * (all_delta - own[None, :]), axis=0)
            row -= tl.where((j == c)[:, None], m[None, :], 0.0)
            sigma = covariance + c * A * A
            mask = deep[:, None] & inside[None, :]
            s = tl.load(
                sigma + k.to(tl.int64)[:, None] * A + columns[None, :], mask=mask, other=0.0
            )
            mirror = tl.load(
                sigma + columns.to(tl.int64)[:, None] * A + k[None, :],
                mask=tl.trans(mask),
                other=0.0,
            )
            both = 0.5 * (s.to(ACC) + tl.trans(mirror.to(ACC)))
            total = tl.dot(row, both, total, input_precision=DOT, out_dtype=ACC)
    place = shares + share.to(tl.int64) * C * A + j[:, None] * A + columns[None, :]
    tl.store(place, total, mask=there[:, None] & inside[None, :])


@triton.jit
def class_sums_kernel(
    residual, labels, row_scale, factor, factor_low, shares, N, C, ignore_index, per_share,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    share = tl.program_id(2)
    total = tl.zeros([BLOCK_C, BLOCK_J], dtype=ACC)
    last = tl.minimum((share + 1) * per_share, N)
    for first in range(share * per_share, last, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        there = rows < last
        y, _ = load_labels(labels, rows, there, ignore_index, C)
        g = tl.load(row_scale + rows * SCALE_STRIDE, mask=there & (y >= 0), other=0.0)
        d = load_tile(residual, rows, C, j, there & (y >= 0), j < C, ACC)
        mine = tl.where(y[None, :] == c[:, None], g[None, :], 0.0)
        total = tl.dot(mine, d, total, input_precision=DOT, out_dtype=ACC)
    total *= number(factor, factor_low, ACC)
    place = shares + share.to(tl.int64) * C * C + c.to(tl.int64)[:, None] * C + j[None, :]
    tl.store(place, total, mask=(c < C)[:, None] & (j < C)[None, :])


def class_sums(
    residual: Tensor, labels: Tensor, row_scale: Tensor, factor: float, ignore_index: int
) -> Tensor:
    """factor · Σ_{i: y_i = c} g_i D_ij, (C, C); `row_scale` g is (N) or (1). One launch, or two."""
    configuration = current_configuration(residual.device)
    tile, (count, num_classes) = configuration.class_sums, residual.shape
    cuts = max(1, triton.cdiv(count, configuration.split_rows))
    shares = residual.new_empty(cuts, num_classes, num_classes)
    launch(
        class_sums_kernel,
        (triton.cdiv(num_classes, tile.rows), triton.cdiv(num_classes, tile.columns), cuts),
        residual, labels, row_scale, *split(factor), shares, count, num_classes, ignore_index,
        configuration.split_rows,
        warps=tile.warps, stages=tile.stages,
        SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_C=tile.rows, BLOCK_J=tile.columns, BLOCK_N=tile.depth,
        ACC=compute_type(residual.dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return shares[0] if cuts == 1 else shares.sum(dim=0)


def weight_shares(covariance: Tensor, weight: Tensor, curvature: Tensor, size: Tensor) -> Tensor:
    """Shares (S, C, A) whose sum is ∂L/∂W through R, for full Σ. One launch."""
    configuration = current_configuration(covariance.device)
    tile, (num_classes, width) = configuration.class_pass_weight, weight.shape
    items = num_classes * triton.cdiv(width, tile.depth)
    blocks = triton.cdiv(num_classes, tile.rows) * triton.cdiv(width, tile.columns)
    cuts = max(1, min(items, configuration.programs // blocks))
    shares = weight.new_empty(cuts, num_classes, width)
    launch(
        class_pass_weight_kernel,
        (triton.cdiv(num_classes, tile.rows), triton.cdiv(width, tile.columns), cuts),
        covariance, weight, curvature, size, shares, num_classes, width, triton.cdiv(items, cuts),
        warps=tile.warps, stages=tile.stages,
        BLOCK_J=tile.rows, BLOCK_A=tile.columns, BLOCK_K=tile.depth,
        ACC=compute_type(weight.dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return shares
