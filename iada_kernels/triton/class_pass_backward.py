"""What flows back through the class pass to W, without keeping (W − 1w_c) Σ_c.

With G = ∂L/∂R (C, C), Δ_j = w_j − w_c and m_c = Σ_j G_cj Δ_j,

    ∂L/∂W_j = Σ_c (G_cj Δ_j − [j = c] m_c) · ½ (Σ_c + Σ_cᵀ)
    ∂L/∂Σ_c = ½ Σ_j G_cj Δ_j Δ_jᵀ                             `class_pass.rank_c_update`

A program owns a tile (classes j, columns i) of ∂L/∂W and sums a split of the pairs (class c,
columns k) into a partial (S, C, A); the tile's last program adds these to the head's own ∂L/∂W.

G itself is a sum over the samples of each class, G_cj = α Σ_{i: y_i = c} g_i D_ij: the product of
the one-hot labels and D, split along the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.config import cdiv
from iada_kernels.triton.device import (
    load_labels,
    load_tile,
    number,
    store_tile,
    tile_at,
    tile_axis,
    wait_for_memory,
)
from iada_kernels.triton.launch import current_configuration, launch, split
from iada_kernels.triton.records import Labels


@triton.jit
def class_pass_weight_kernel(
    covariance, weight, curvature, size, partials, grad, arrived, C, A, items_per_split,
    BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows, row_mask = tile_axis(0, BLOCK_J, C)
    cols, col_mask = tile_axis(1, BLOCK_A, A)
    split_id = tl.program_id(2)
    steps = tl.cdiv(A, BLOCK_K)
    total = tl.zeros([BLOCK_J, BLOCK_A], dtype=ACC)
    end = tl.minimum((split_id + 1) * items_per_split, C * steps)
    for item in range(split_id * items_per_split, end):
        c = (item // steps).to(tl.int64)
        if tl.load(size + c) > 0:
            k = (item % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
            k_mask = k < A
            w_label = tl.load(weight + c * A + k, mask=k_mask, other=0.0)
            g = tl.load(curvature + c * C + rows, mask=row_mask, other=0.0)
            delta = load_tile(weight, rows, A, k, row_mask, k_mask, ACC) - w_label[None, :]
            scaled = tl.where(row_mask[:, None], g[:, None] * delta, 0.0)
            if C <= BLOCK_J:
                m = tl.sum(scaled, axis=0)
            else:
                m = tl.zeros([BLOCK_K], dtype=ACC)
                for first in range(0, C, BLOCK_J):
                    all_c = first + tl.arange(0, BLOCK_J)
                    all_g = tl.load(curvature + c * C + all_c, mask=all_c < C, other=0.0)
                    all_delta = load_tile(weight, all_c, A, k, all_c < C, k_mask, ACC)
                    m += tl.sum(all_g[:, None] * (all_delta - w_label[None, :]), axis=0)
            scaled -= tl.where((rows == c)[:, None], m[None, :], 0.0)
            sigma = covariance + c * A * A
            mask = k_mask[:, None] & col_mask[None, :]
            s = tl.load(sigma + k.to(tl.int64)[:, None] * A + cols[None, :], mask=mask, other=0.0)
            mirror = tl.load(
                sigma + cols.to(tl.int64)[:, None] * A + k[None, :],
                mask=tl.trans(mask),
                other=0.0,
            )
            both = 0.5 * (s.to(ACC) + tl.trans(mirror.to(ACC)))
            total = tl.dot(scaled, both, total, input_precision=DOT, out_dtype=ACC)
    offs = rows.to(tl.int64)[:, None] * A + cols[None, :]
    tile_mask = row_mask[:, None] & col_mask[None, :]
    tl.store(partials + split_id.to(tl.int64) * C * A + offs, total, mask=tile_mask)
    wait_for_memory()
    tl.debug_barrier()  # the partial of this program is there before it counts
    tile, splits = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.num_programs(2)
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1:
        result = tl.load(grad + offs, mask=tile_mask, other=0.0)
        for index in range(splits):  # other multiprocessors stored them: past the first-level cache
            ptrs = partials + tl.cast(index, tl.int64) * C * A + offs
            result += tl.load(ptrs, mask=tile_mask, other=0.0, cache_modifier=".cg")
        wait_for_memory()
        tl.debug_barrier()  # all of the tile has been read
        tl.store(grad + offs, result, mask=tile_mask)


@triton.jit
def sum_by_class(
    residual, labels, row_scale, factor, partials, row, column, split_id, N, C, rows_per_split,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of the class sums of a split of the batch."""
    classes, row_mask = tile_at(row, BLOCK_C, C)
    offs_c, col_mask = tile_at(column, BLOCK_J, C)
    total = tl.zeros([BLOCK_C, BLOCK_J], dtype=ACC)
    end = tl.minimum((split_id + 1) * rows_per_split, N)
    for first in range(split_id * rows_per_split, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        k_mask = rows < end
        y, _ = load_labels(labels, rows, k_mask, C)
        g = tl.load(row_scale + rows * SCALE_STRIDE, mask=k_mask & (y >= 0), other=0.0)
        d = load_tile(residual, rows, C, offs_c, k_mask & (y >= 0), col_mask, ACC)
        same_class = tl.where(y[None, :] == classes[:, None], g[None, :], 0.0)
        total = tl.dot(same_class, d, total, input_precision=DOT, out_dtype=ACC)
    total *= number(factor, ACC)
    partial = partials + split_id.to(tl.int64) * C * C
    store_tile(partial, classes, C, offs_c, row_mask, col_mask, total)


@triton.jit
def class_sums_kernel(
    residual, labels, row_scale, factor, partials, N, C, rows_per_split,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row, column, split_id = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sum_by_class(
        residual, labels, row_scale, factor, partials, row, column, split_id, N, C, rows_per_split,
        SCALE_STRIDE, BLOCK_C, BLOCK_J, BLOCK_N, ACC, DOT,
    )  # fmt: skip


def class_sums(residual: Tensor, labels: Labels, row_scale: Tensor, factor: float) -> Tensor:
    """factor · Σ_{i: y_i = c} g_i D_ij, (C, C); `row_scale` g is (N) or (1). One launch, or two."""
    configuration = current_configuration(residual.device)
    tile, (count, num_classes) = configuration.class_sums, residual.shape
    rows_per_split = configuration.split_rows
    splits = max(1, cdiv(count, rows_per_split))
    partials = residual.new_empty(splits, num_classes, num_classes)
    launch(
        class_sums_kernel, (*tile.grid(num_classes, num_classes), splits),
        residual, labels, row_scale, split(factor), partials, count, num_classes, rows_per_split,
        like=residual, tile=tile, SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_C=tile.rows, BLOCK_J=tile.columns, BLOCK_N=tile.depth,
    )  # fmt: skip
    return partials[0] if splits == 1 else partials.sum(dim=0)


def table_counters(weight: Tensor) -> Tensor:
    """int32, one for each tile of `add_table_gradient`, to be set to 0 by a launch before it."""
    tile = current_configuration(weight.device).class_pass_weight.of(weight.dtype)
    rows, columns = tile.grid(*weight.shape)
    return torch.empty(rows * columns, dtype=torch.int32, device=weight.device)


def add_table_gradient(
    covariance: Tensor,
    weight: Tensor,
    curvature: Tensor,
    size: Tensor,
    grad: Tensor,
    arrived: Tensor,
) -> None:
    """∂L/∂W through R, for full Σ, onto `grad` (C, A). One launch; `arrived` is 0 before."""
    configuration = current_configuration(covariance.device)
    tile, (num_classes, width) = configuration.class_pass_weight.of(weight.dtype), weight.shape
    items = num_classes * cdiv(width, tile.depth)
    rows, columns = tile.grid(num_classes, width)
    splits = max(1, min(items, configuration.programs // (rows * columns)))
    partials = weight.new_empty(splits, num_classes, width)
    launch(
        class_pass_weight_kernel, (rows, columns, splits),
        covariance, weight, curvature, size, partials, grad, arrived, num_classes, width,
        cdiv(items, splits),
        like=weight, tile=tile, BLOCK_J=tile.rows, BLOCK_A=tile.columns, BLOCK_K=tile.depth,
    )  # fmt: skip
