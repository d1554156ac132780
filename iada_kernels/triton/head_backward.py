"""The head backward: from D (N, C) and the gradient g of each row's loss.

    features  ∂L/∂h  = g D W              its dot with s is ∂L/∂ε, added up over tiles of columns
    weight    ∂L/∂W  = (g D)ᵀ (h + ε s) + partials of the class pass,   ∂L/∂b = Σ_i g_i D_i
    diagonal  ∂L/∂σ_c = ½ α Σ_{i: y_i=c} g_i Σ_j D_ij (w_j − w_c)²

For a diagonal Σ the quadratic term adds to ∂L/∂W, with W centred and x = h + ε s − α σ_y∘w_y,

    (g D)ᵀ x + α w_j ∘ ((g D)ᵀ σ_y) − α σ_j ∘ Σ_{i: y_i = j} ∂L/∂h_i

because the rows of D sum to 0. Sums over the batch are split into partials (S, ...) of a fixed
number of rows, added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.layout import contiguous_as, unit_inner_stride
from iada_kernels.triton.device import load_labels, load_tile, number, store_tile, tile_axis
from iada_kernels.triton.launch import (
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    split,
)
from iada_kernels.triton.rows import Groups


@triton.jit
def grad_features_kernel(
    residual, weight, row_scale, sign, grad, epsilon_partials, N, C, A,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows, row_mask = tile_axis(0, BLOCK_N, N)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    total = tl.zeros([BLOCK_N, BLOCK_A], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        d = load_tile(residual, rows, C, offs_c, row_mask, offs_c < C, ACC)
        w = load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    total *= tl.load(row_scale + rows * SCALE_STRIDE, mask=row_mask, other=0.0)[:, None]
    if grad is not None:
        store_tile(grad, rows, A, offs_a, row_mask, col_mask, total)
    if sign is not None:
        s = load_tile(sign, rows, A, offs_a, row_mask, col_mask, ACC)
        ptrs = epsilon_partials + tl.program_id(1).to(tl.int64) * N + rows
        tl.store(ptrs, tl.sum(total * s, axis=1), mask=row_mask)


@triton.jit
def grad_weight_kernel(
    residual, row_scale, features, stride, labels, sign, epsilon,
    variances, weight, weight_mean, grad_features, alpha, alpha_low,
    table_partials, num_partials, grad, grad_bias, N, C, A, ignore_index, rows_per_split,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    offs_c, row_mask = tile_axis(0, BLOCK_C, C)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    split_id = tl.program_id(2)
    total = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    if variances is not None:
        mean_w = tl.load(weight_mean + offs_a, mask=col_mask, other=0.0)
        sigma_sum = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
        class_sum_dh = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
        alpha_value = number(alpha, alpha_low, ACC)
    end = tl.minimum((split_id + 1) * rows_per_split, N)
    for first in range(split_id * rows_per_split, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        k_mask = rows < end
        g = tl.load(row_scale + rows * SCALE_STRIDE, mask=k_mask, other=0.0)
        d = tl.trans(load_tile(residual, rows, C, offs_c, k_mask, row_mask, ACC) * g[:, None])
        sums += tl.sum(d, axis=1)
        x = load_tile(features, rows, stride, offs_a, k_mask, col_mask, ACC)
        if sign is not None:
            eps = tl.load(epsilon + rows, mask=k_mask, other=0.0).to(ACC)
            x += eps[:, None] * load_tile(sign, rows, A, offs_a, k_mask, col_mask, ACC)
        if variances is not None:
            y, _ = load_labels(labels, rows, k_mask, ignore_index, C)
            label = tl.maximum(y, 0)
            sigma = load_tile(variances, label, A, offs_a, k_mask, col_mask, ACC)
            w_label = load_tile(weight, label, A, offs_a, k_mask, col_mask, ACC) - mean_w[None, :]
            x -= alpha_value * sigma * w_label
            sigma_sum = tl.dot(d, sigma, sigma_sum, input_precision=DOT, out_dtype=ACC)
            same_class = (y[None, :] == offs_c[:, None]).to(ACC)
            dh = load_tile(grad_features, rows, A, offs_a, k_mask, col_mask, ACC)
            class_sum_dh = tl.dot(same_class, dh, class_sum_dh, input_precision=DOT, out_dtype=ACC)
        total = tl.dot(d, x, total, input_precision=DOT, out_dtype=ACC)
    if variances is not None:
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
    residual, row_scale, order, start, size, weight, grad, alpha, alpha_low, C, A,
    SCALE_STRIDE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    w_label = tl.load(weight + c * A + offs_a, mask=col_mask, other=0.0)
    total = tl.zeros([BLOCK_A], dtype=ACC)
    first, m = tl.load(start + c), tl.load(size + c)
    for k in range(m):
        row = tl.load(order + first + k).to(tl.int64)
        g = tl.load(row_scale + row * SCALE_STRIDE)
        for begin in range(0, C, BLOCK_J):
            offs_c = begin + tl.arange(0, BLOCK_J)
            d = tl.load(residual + row * C + offs_c, mask=offs_c < C, other=0.0)
            delta = (
                load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC) - w_label[None, :]
            )
            total += g * tl.sum(d[:, None] * delta * delta, axis=0)
    total *= 0.5 * number(alpha, alpha_low, ACC)
    tl.store(grad + c * A + offs_a, total, mask=col_mask)


def grad_features(
    residual: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    sign: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂h (N, A) in `dtype`, None for none, and ∂L/∂ε (N), None without `sign`."""
    configuration = current_configuration(weight.device)
    tile, count, (num_classes, width) = configuration.grad_features, len(residual), weight.shape
    tiles = triton.cdiv(width, tile.columns)
    grad = None if dtype is None else weight.new_empty(count, width, dtype=dtype)
    partials = None if sign is None else weight.new_empty(tiles, count)
    launch(
        grad_features_kernel,
        (triton.cdiv(count, tile.rows), tiles),
        residual, weight, row_scale, sign, grad, partials, count, num_classes, width,
        warps=tile.warps, stages=tile.stages,
        SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
        ACC=compute_type(weight.dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return grad, None if partials is None else _sum(partials)


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
    configuration = current_configuration(weight.device)
    tile, count, (num_classes, width) = configuration.grad_weight, len(residual), weight.shape
    splits = max(1, triton.cdiv(count, configuration.split_rows))
    grad = weight.new_empty(splits, num_classes, width) if needs_weight else None
    bias = weight.new_empty(splits, num_classes) if needs_bias else None
    variances = weight_mean = None
    epsilon = None if sign is None else contiguous_as(inputs.epsilon, weight.dtype)
    if inputs.covariance is not None and inputs.covariance.dim() == 2 and needs_weight:
        variances = contiguous_as(inputs.covariance, weight.dtype)
        weight_mean = weight.mean(dim=0)
        tile = configuration.diagonal_weight
    features = unit_inner_stride(inputs.features)
    columns = triton.cdiv(width, tile.columns) if needs_weight else 1
    launch(
        grad_weight_kernel,
        (triton.cdiv(num_classes, tile.rows), columns, splits),
        residual, row_scale, features, features.stride(0), inputs.labels.contiguous(), sign,
        epsilon, variances, weight, weight_mean, feature_gradient, *split(options.alpha),
        table_partials, 0 if table_partials is None else len(table_partials), grad, bias,
        count, num_classes, width, options.ignore_index, configuration.split_rows,
        warps=tile.warps, stages=tile.stages,
        SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_C=tile.rows, BLOCK_A=tile.columns, BLOCK_N=tile.depth,
        ACC=compute_type(weight.dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return None if grad is None else _sum(grad), None if bias is None else _sum(bias)


def grad_variances(
    residual: Tensor, row_scale: Tensor, groups: Groups, weight: Tensor, alpha: float
) -> Tensor:
    """∂L/∂Σ (C, A) of a diagonal Σ; 0 for classes without samples."""
    tile, (num_classes, width) = current_configuration(weight.device).statistics, weight.shape
    grad = torch.empty_like(weight)
    launch(
        grad_variances_kernel,
        (num_classes, triton.cdiv(width, tile.columns)),
        residual, row_scale, groups.order, groups.start, groups.size, weight, grad,
        *split(alpha), num_classes, width,
        warps=tile.warps, stages=tile.stages,
        SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_J=tile.rows, BLOCK_A=tile.columns,
        ACC=compute_type(weight.dtype),
    )  # fmt: skip
    return grad


def _sum(partials: Tensor) -> Tensor:
    return partials[0] if len(partials) == 1 else partials.sum(dim=0)
