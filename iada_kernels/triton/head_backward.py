"""The head backward: from D (N, C) and the gradient g of each row's loss.

    features  ∂L/∂h  = g D W              its dot with s is ∂L/∂ε, added up over tiles of columns
    weight    ∂L/∂W  = (g D)ᵀ (h + ε s) + partials of the class pass,   ∂L/∂b = Σ_i g_i D_i
    diagonal  ∂L/∂σ_c = ½ α Σ_{i: y_i=c} g_i Σ_j D_ij (w_j − w_c)²

For a diagonal Σ the quadratic term adds to ∂L/∂W, with W centred and x = h + ε s − α σ_y∘w_y,

    (g D)ᵀ x + α w_j ∘ ((g D)ᵀ σ_y) − α σ_j ∘ Σ_{i: y_i = j} ∂L/∂h_i

because the rows of D sum to 0. Sums over the batch are split into partials (S, ...) of a fixed
number of rows, added in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.triton.config import cdiv
from iada_kernels.triton.device import (
    load_labels,
    load_samples,
    load_tile,
    number,
    onto_features,
    store_tile,
    tile_axis,
)
from iada_kernels.triton.launch import Number, current_configuration, launch, split
from iada_kernels.triton.records import Diagonal, Labels, Samples, Sizes
from iada_kernels.triton.rows import Groups


@triton.jit
def grad_features_kernel(
    residual, weight, row_scale, sign, grad, epsilon_partials, sizes,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask = tile_axis(0, BLOCK_N, N)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    total = onto_features(
        residual, rows, row_mask, weight, A, offs_a, col_mask, C,
        BLOCK_N, BLOCK_A, BLOCK_C, ACC, DOT,
    )  # fmt: skip
    total *= tl.load(row_scale + rows * SCALE_STRIDE, mask=row_mask, other=0.0)[:, None]
    if grad is not None:
        store_tile(grad, rows, A, offs_a, row_mask, col_mask, total)
    if sign is not None:
        s = load_tile(sign, rows, A, offs_a, row_mask, col_mask, ACC)
        ptrs = epsilon_partials + tl.program_id(1).to(tl.int64) * N + rows
        tl.store(ptrs, tl.sum(total * s, axis=1), mask=row_mask)


class DiagonalGradient(NamedTuple):
    """What the quadratic term of a diagonal Σ adds to ∂L/∂W is made of."""

    diagonal: Diagonal
    weight: Tensor
    grad_features: Tensor  # ∂L/∂h in the compute dtype
    alpha: Number


@triton.jit
def grad_weight_kernel(
    residual, row_scale, samples, labels, quadratic, table_partials, num_partials,
    grad, grad_bias, sizes, rows_per_split,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    offs_c, row_mask = tile_axis(0, BLOCK_C, C)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    split_id = tl.program_id(2)
    total = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    if quadratic is not None:
        weight, variances = quadratic.weight, quadratic.diagonal.variances
        mean_w = tl.load(quadratic.diagonal.weight_mean + offs_a, mask=col_mask, other=0.0)
        sigma_sum = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
        class_sum_dh = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
        alpha_value = number(quadratic.alpha, ACC)
    end = tl.minimum((split_id + 1) * rows_per_split, N)
    for first in range(split_id * rows_per_split, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        k_mask = rows < end
        g = tl.load(row_scale + rows * SCALE_STRIDE, mask=k_mask, other=0.0)
        d = tl.trans(load_tile(residual, rows, C, offs_c, k_mask, row_mask, ACC) * g[:, None])
        sums += tl.sum(d, axis=1)
        x = load_samples(samples, None, rows, offs_a, k_mask, col_mask, A, ACC)
        if quadratic is not None:
            y, _ = load_labels(labels, rows, k_mask, C)
            label = tl.maximum(y, 0)
            sigma = load_tile(variances, label, A, offs_a, k_mask, col_mask, ACC)
            w_label = load_tile(weight, label, A, offs_a, k_mask, col_mask, ACC) - mean_w[None, :]
            x -= alpha_value * sigma * w_label
            sigma_sum = tl.dot(d, sigma, sigma_sum, input_precision=DOT, out_dtype=ACC)
            same_class = (y[None, :] == offs_c[:, None]).to(ACC)
            dh = load_tile(quadratic.grad_features, rows, A, offs_a, k_mask, col_mask, ACC)
            class_sum_dh = tl.dot(same_class, dh, class_sum_dh, input_precision=DOT, out_dtype=ACC)
        total = tl.dot(d, x, total, input_precision=DOT, out_dtype=ACC)
    if quadratic is not None:
        w = load_tile(weight, offs_c, A, offs_a, row_mask, col_mask, ACC) - mean_w[None, :]
        sigma = load_tile(variances, offs_c, A, offs_a, row_mask, col_mask, ACC)
        total += alpha_value * (w * sigma_sum - sigma * class_sum_dh)
    mask = row_mask[:, None] & col_mask[None, :]
    if table_partials is not None:
        if split_id == 0:
            for index in range(num_partials):
                partial = table_partials + tl.cast(index, tl.int64) * C * A
                total += load_tile(partial, offs_c, A, offs_a, row_mask, col_mask, ACC)
    if grad is not None:
        partial = grad + split_id.to(tl.int64) * C * A
        ptrs = partial + offs_c.to(tl.int64)[:, None] * A + offs_a[None, :]
        tl.store(ptrs, total, mask=mask)
    if grad_bias is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias + split_id * C + offs_c, sums, mask=row_mask)


@triton.jit
def grad_variances_kernel(
    residual, row_scale, groups, weight, grad, alpha, C, A,
    SCALE_STRIDE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    w_label = tl.load(weight + c * A + offs_a, mask=col_mask, other=0.0)
    total = tl.zeros([BLOCK_A], dtype=ACC)
    first, m = tl.load(groups.start + c), tl.load(groups.size + c)
    for k in range(m):
        row = tl.load(groups.order + first + k).to(tl.int64)
        g = tl.load(row_scale + row * SCALE_STRIDE)
        for begin in range(0, C, BLOCK_J):
            offs_c = begin + tl.arange(0, BLOCK_J)
            d = tl.load(residual + row * C + offs_c, mask=offs_c < C, other=0.0)
            delta = (
                load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC) - w_label[None, :]
            )
            total += g * tl.sum(d[:, None] * delta * delta, axis=0)
    total *= 0.5 * number(alpha, ACC)
    tl.store(grad + c * A + offs_a, total, mask=col_mask)


def grad_features(
    sizes: Sizes,
    residual: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    sign: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂h (N, A) in `dtype`, None for none, and ∂L/∂ε (N), None without `sign`."""
    tile = current_configuration(weight.device).grad_features
    grid = tile.grid(sizes.N, sizes.A)
    grad = None if dtype is None else weight.new_empty(sizes.N, sizes.A, dtype=dtype)
    partials = None if sign is None else weight.new_empty(grid[1], sizes.N)
    launch(
        grad_features_kernel, grid,
        residual, weight, row_scale, sign, grad, partials, sizes,
        like=weight, tile=tile, SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
    )  # fmt: skip
    return grad, _sum(partials)


def grad_weight(
    inputs: LossInputs,
    options: LossOptions,
    weight: Tensor,
    residual: Tensor,
    row_scale: Tensor,
    sign: Tensor | None,
    feature_gradient: Tensor | None,
    table_partials: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂W (C, A) and Σ_i g_i D_i (C), those needed.

    `feature_gradient` is ∂L/∂h in the compute dtype for a diagonal Σ; `table_partials` are
    those of the class pass (S, C, A) for a full one.
    """
    configuration, sizes = current_configuration(weight.device), Sizes.of(inputs)
    tile, rows_per_split = configuration.grad_weight, configuration.split_rows
    quadratic = None
    diagonal = Diagonal.of(inputs, weight) if needs_weight else None
    if diagonal is not None and feature_gradient is not None:
        quadratic = DiagonalGradient(diagonal, weight, feature_gradient, split(options.alpha))
        tile = configuration.diagonal_weight
    splits = max(1, cdiv(sizes.N, rows_per_split))
    grad = weight.new_empty(splits, *weight.shape) if needs_weight else None
    bias = weight.new_empty(splits, sizes.C) if needs_bias else None
    rows, columns = tile.grid(*weight.shape)
    launch(
        grad_weight_kernel, (rows, columns if needs_weight else 1, splits),
        residual, row_scale, Samples.of(inputs, sign), Labels.of(inputs, options), quadratic,
        table_partials, 0 if table_partials is None else len(table_partials),
        grad, bias, sizes, rows_per_split,
        like=weight, tile=tile, SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_C=tile.rows, BLOCK_A=tile.columns, BLOCK_N=tile.depth,
    )  # fmt: skip
    return _sum(grad), _sum(bias)


def grad_variances(
    residual: Tensor, row_scale: Tensor, groups: Groups, weight: Tensor, alpha: float
) -> Tensor:
    """∂L/∂Σ (C, A) of a diagonal Σ; 0 for classes without samples."""
    tile, (num_classes, width) = current_configuration(weight.device).statistics, weight.shape
    grad = torch.empty_like(weight)
    launch(
        grad_variances_kernel, (num_classes, cdiv(width, tile.columns)),
        residual, row_scale, groups, weight, grad, split(alpha), num_classes, width,
        like=weight, tile=tile, SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_J=tile.rows, BLOCK_A=tile.columns,
    )  # fmt: skip
    return grad


def _sum(partials: Tensor | None) -> Tensor | None:
    if partials is None:
        return None
    return partials[0] if len(partials) == 1 else partials.sum(dim=0)
