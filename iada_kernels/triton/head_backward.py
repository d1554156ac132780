"""The head backward: from D (N, C) and the gradient g of each row's loss.

    features  ∂L/∂h  = g D W              its dot with s is ∂L/∂ε, added up over tiles of columns
    weight    ∂L/∂W  = (g D)ᵀ (h + ε s) + shares of the class pass,   ∂L/∂b = Σ_i g_i D_i
    diagonal  ∂L/∂σ_c = ½ α Σ_{i: y_i=c} g_i Σ_j D_ij (w_j − w_c)²

For a diagonal Σ the quadratic term adds to ∂L/∂W, with W centred and x = h + ε s − α σ_y∘w_y,

    (g D)ᵀ x + α w_j ∘ ((g D)ᵀ σ_y) − α σ_j ∘ Σ_{i: y_i = j} ∂L/∂h_i

because the rows of D sum to 0. Sums over the batch are cut into shares (S, ...) of a fixed number
of rows, added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.triton.device import load_labels, load_tile, number
from iada_kernels.triton.launch import (
    by_rows,
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    plain,
    split,
)
from iada_kernels.triton.rows import Groups


@triton.jit
def grad_features_kernel(
    residual, weight, row_scale, sign, grad, epsilon_parts, N, C, A,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    there, inside = rows < N, a < A
    total = tl.zeros([BLOCK_N, BLOCK_A], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        d = load_tile(residual, rows, C, j, there, j < C, ACC)
        w = load_tile(weight, j, A, a, j < C, inside, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    total *= tl.load(row_scale + rows * SCALE_STRIDE, mask=there, other=0.0)[:, None]
    mask = there[:, None] & inside[None, :]
    if grad is not None:
        place = grad + rows.to(tl.int64)[:, None] * A + a[None, :]
        tl.store(place, total.to(grad.dtype.element_ty), mask=mask)
    if sign is not None:
        s = load_tile(sign, rows, A, a, there, inside, ACC)
        part = epsilon_parts + tl.program_id(1).to(tl.int64) * N + rows
        tl.store(part, tl.sum(total * s, axis=1), mask=there)


@triton.jit
def grad_weight_kernel(
    residual, row_scale, features, stride, labels, sign, epsilon,
    variances, weight, offset, grad_features, alpha, alpha_low,
    more, more_count, grad, grad_bias, N, C, A, ignore_index, per_share,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    share = tl.program_id(2)
    there, inside = j < C, a < A
    total = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    if variances is not None:
        shared = tl.load(offset + a, mask=inside, other=0.0)
        spread = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
        turned = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
        strength = number(alpha, alpha_low, ACC)
    last = tl.minimum((share + 1) * per_share, N)
    for first in range(share * per_share, last, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        deep = rows < last
        g = tl.load(row_scale + rows * SCALE_STRIDE, mask=deep, other=0.0)
        d = tl.trans(load_tile(residual, rows, C, j, deep, there, ACC) * g[:, None])
        sums += tl.sum(d, axis=1)
        x = load_tile(features, rows, stride, a, deep, inside, ACC)
        if sign is not None:
            move = tl.load(epsilon + rows, mask=deep, other=0.0).to(ACC)
            x += move[:, None] * load_tile(sign, rows, A, a, deep, inside, ACC)
        if variances is not None:
            y, _ = load_labels(labels, rows, deep, ignore_index, C)
            own = tl.maximum(y, 0)
            sigma = load_tile(variances, own, A, a, deep, inside, ACC)
            w_own = load_tile(weight, own, A, a, deep, inside, ACC) - shared[None, :]
            x -= strength * sigma * w_own
            spread = tl.dot(d, sigma, spread, input_precision=DOT, out_dtype=ACC)
            mine = (y[None, :] == j[:, None]).to(ACC)
            dh = load_tile(grad_features, rows, A, a, deep, inside, ACC)
            turned = tl.dot(mine, dh, turned, input_precision=DOT, out_dtype=ACC)
        total = tl.dot(d, x, total, input_precision=DOT, out_dtype=ACC)
    if variances is not None:
        w = load_tile(weight, j, A, a, there, inside, ACC) - shared[None, :]
        total += strength * (
            w * spread - load_tile(variances, j, A, a, there, inside, ACC) * turned
        )
    mask = there[:, None] & inside[None, :]
    if more is not None:
        if share == 0:
            for part in range(more_count):
                total += load_tile(
                    more + tl.cast(part, tl.int64) * C * A, j, A, a, there, inside, ACC
                )
    if grad is not None:
        place = grad + share.to(tl.int64) * C * A + j.to(tl.int64)[:, None] * A + a[None, :]
        tl.store(place, total, mask=mask)
    if grad_bias is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias + share * C + j, sums, mask=there)


@triton.jit
def grad_variances_kernel(
    residual, row_scale, order, start, size, weight, grad, alpha, alpha_low, C, A,
    SCALE_STRIDE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = a < A
    own = tl.load(weight + c * A + a, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_A], dtype=ACC)
    first, m = tl.load(start + c), tl.load(size + c)
    for k in range(m):
        row = tl.load(order + first + k).to(tl.int64)
        g = tl.load(row_scale + row * SCALE_STRIDE)
        for begin in range(0, C, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            d = tl.load(residual + row * C + j, mask=j < C, other=0.0)
            delta = load_tile(weight, j, A, a, j < C, inside, ACC) - own[None, :]
            total += g * tl.sum(d[:, None] * delta * delta, axis=0)
    total *= 0.5 * number(alpha, alpha_low, ACC)
    tl.store(grad + c * A + a, total, mask=inside)


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
    parts = None if sign is None else weight.new_empty(tiles, count)
    launch(
        grad_features_kernel,
        (triton.cdiv(count, tile.rows), tiles),
        residual, weight, row_scale, sign, grad, parts, count, num_classes, width,
        warps=tile.warps, stages=tile.stages,
        SCALE_STRIDE=int(len(row_scale) > 1),
        BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
        ACC=compute_type(weight.dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return grad, None if parts is None else _sum(parts)


def grad_weight(
    inputs: LossInputs,
    options: LossOptions,
    weight: Tensor,
    residual: Tensor,
    row_scale: Tensor,
    sign: Tensor | None,
    feature_gradient: Tensor | None,
    more: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂W (C, A) and Σ_i g_i D_i (C), those needed.

    `feature_gradient` is ∂L/∂h in the compute dtype for a diagonal Σ; `more` the shares (S, C, A)
    of the class pass for a full one.
    """
    configuration = current_configuration(weight.device)
    tile, count, (num_classes, width) = configuration.grad_weight, len(residual), weight.shape
    cuts = max(1, triton.cdiv(count, configuration.split_rows))
    grad = weight.new_empty(cuts, num_classes, width) if needs_weight else None
    bias = weight.new_empty(cuts, num_classes) if needs_bias else None
    variances = offset = None
    epsilon = None if sign is None else plain(inputs.epsilon, weight.dtype)
    if inputs.covariance is not None and inputs.covariance.dim() == 2 and needs_weight:
        variances = plain(inputs.covariance, weight.dtype)
        offset = weight.mean(dim=0)
        tile = configuration.diagonal_weight
    features = by_rows(inputs.features)
    columns = triton.cdiv(width, tile.columns) if needs_weight else 1
    launch(
        grad_weight_kernel,
        (triton.cdiv(num_classes, tile.rows), columns, cuts),
        residual, row_scale, features, features.stride(0), inputs.labels.contiguous(), sign,
        epsilon, variances, weight, offset, feature_gradient, *split(options.alpha),
        more, 0 if more is None else len(more), grad, bias,
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


def _sum(shares: Tensor) -> Tensor:
    return shares[0] if len(shares) == 1 else shares.sum(dim=0)
