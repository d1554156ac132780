"""The head backward: from D (N, C) and the gradient g of each row's loss.

    features  ∂L/∂h  = g D W              its dot with s is ∂L/∂ε, added up over tiles of columns
    weight    ∂L/∂W  = (g D)ᵀ (h + ε s),   ∂L/∂b = Σ_i g_i D_i
    sums      G, for `class_pass_backward`, which adds to ∂L/∂W
    diagonal  ∂L/∂σ_c = ½ α Σ_{i: y_i=c} g_i Σ_j D_ij (w_j − w_c)²

For a diagonal Σ the quadratic term adds to ∂L/∂W, with W centred and x = h + ε s − α σ_y∘w_y,

    (g D)ᵀ x + α w_j ∘ ((g D)ᵀ σ_y) − α σ_j ∘ Σ_{i: y_i = j} ∂L/∂h_i

because the rows of D sum to 0. Sums over the batch are split into partials (S, ...) of a fixed
number of rows, added in order.

Sums, features and weight are one launch, whose programs are dealt out to them in this order; for a
diagonal Σ two, because ∂L/∂W is made of ∂L/∂h.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.triton.class_pass_backward import sum_by_class
from iada_kernels.triton.config import Tile, cdiv
from iada_kernels.triton.device import (
    load_labels,
    load_samples,
    load_tile,
    number,
    onto_features,
    set_to_zero,
    store_tile,
    tile_at,
    tile_axis,
)
from iada_kernels.triton.launch import Number, current_configuration, launch, split
from iada_kernels.triton.records import Diagonal, Labels, Samples, Sizes
from iada_kernels.triton.rows import Groups


class Grid(NamedTuple):
    """How many tiles a result has, and in how many parts the batch is split."""

    rows: int
    columns: int
    splits: int


class Blocks(NamedTuple):
    """The tiles of the products: rows, columns and steps."""

    SUMS_C: tl.constexpr
    SUMS_J: tl.constexpr
    SUMS_N: tl.constexpr
    FEATURES_N: tl.constexpr
    FEATURES_A: tl.constexpr
    FEATURES_C: tl.constexpr
    WEIGHT_C: tl.constexpr
    WEIGHT_A: tl.constexpr
    WEIGHT_N: tl.constexpr


class Results(NamedTuple):
    """Where the products go, those asked for; (S, ...) are partials, without S where it is 1."""

    sums: Tensor | None  # (S, C, C)
    features: Tensor | None  # (N, A)
    epsilon: Tensor | None  # (tiles of columns, N)
    weight: Tensor | None  # (S, C, A)
    bias: Tensor | None  # (S, C)


class DiagonalGradient(NamedTuple):
    """What the quadratic term of a diagonal Σ adds to ∂L/∂W is made of."""

    diagonal: Diagonal
    grad_features: Tensor  # ∂L/∂h in the compute dtype
    alpha: Number


@triton.jit
def _grad_features(
    residual, weight, row_scale, sign, grad, epsilon_partials, row, column, sizes,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask = tile_at(row, BLOCK_N, N)
    offs_a, col_mask = tile_at(column, BLOCK_A, A)
    total = onto_features(
        residual, rows, row_mask, weight, A, offs_a, col_mask, C,
        BLOCK_N, BLOCK_A, BLOCK_C, ACC, DOT,
    )  # fmt: skip
    total *= tl.load(row_scale + rows * SCALE_STRIDE, mask=row_mask, other=0.0)[:, None]
    if grad is not None:
        store_tile(grad, rows, A, offs_a, row_mask, col_mask, total)
    if epsilon_partials is not None:
        s = load_tile(sign, rows, A, offs_a, row_mask, col_mask, ACC)
        ptrs = epsilon_partials + column.to(tl.int64) * N + rows
        tl.store(ptrs, tl.sum(total * s, axis=1), mask=row_mask)


@triton.jit
def _grad_weight(
    residual, weight, row_scale, samples, labels, quadratic, grad, grad_bias,
    row, column, split_id, sizes, rows_per_split,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    offs_c, row_mask = tile_at(row, BLOCK_C, C)
    offs_a, col_mask = tile_at(column, BLOCK_A, A)
    total = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    if quadratic is not None:
        variances = quadratic.diagonal.variances
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
    if grad is not None:
        partial = grad + split_id.to(tl.int64) * C * A
        ptrs = partial + offs_c.to(tl.int64)[:, None] * A + offs_a[None, :]
        tl.store(ptrs, total, mask=mask)
    if grad_bias is not None:
        if column == 0:
            tl.store(grad_bias + split_id * C + offs_c, sums, mask=row_mask)


@triton.jit
def _tile_of(program, grid):
    """Row, column and split of a program among those of `grid`."""
    column, rest = program % grid.columns, program // grid.columns
    return rest % grid.rows, column, rest // grid.rows


@triton.jit
def head_backward_kernel(
    residual, row_scale, weight, samples, labels, quadratic, factor, results, arrived,
    num_arrived, sums_grid, features_grid, weight_grid, sizes, rows_per_split,
    SCALE_STRIDE: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Programs are dealt out to the products, grid by grid; None is a product not asked for."""
    N, C, _ = sizes
    program = tl.program_id(0)
    if arrived is not None:  # for the class pass, which comes after all of this
        if program == 0:
            set_to_zero(arrived, num_arrived)
    if sums_grid is not None:
        count = sums_grid.rows * sums_grid.columns * sums_grid.splits
        if program < count:
            row, column, split_id = _tile_of(program, sums_grid)
            sum_by_class(
                residual, labels, row_scale, factor, results.sums, row, column, split_id,
                N, C, rows_per_split, SCALE_STRIDE, B.SUMS_C, B.SUMS_J, B.SUMS_N, ACC, DOT,
            )  # fmt: skip
        program -= count
    if features_grid is not None:
        count = features_grid.rows * features_grid.columns
        if (program >= 0) & (program < count):
            row, column, _ = _tile_of(program, features_grid)
            _grad_features(
                residual, weight, row_scale, samples.sign, results.features, results.epsilon,
                row, column, sizes,
                SCALE_STRIDE, B.FEATURES_N, B.FEATURES_A, B.FEATURES_C, ACC, DOT,
            )  # fmt: skip
        program -= count
    if weight_grid is not None:
        if program >= 0:
            row, column, split_id = _tile_of(program, weight_grid)
            _grad_weight(
                residual, weight, row_scale, samples, labels, quadratic,
                results.weight, results.bias, row, column, split_id, sizes, rows_per_split,
                SCALE_STRIDE, B.WEIGHT_C, B.WEIGHT_A, B.WEIGHT_N, ACC, DOT,
            )  # fmt: skip


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


class Wanted(NamedTuple):
    """The products that one launch is asked for."""

    sums: bool = False
    features: torch.dtype | None = None  # the dtype of ∂L/∂h, None for none
    epsilon: bool = False
    weight: bool = False
    bias: bool = False


def head_products(
    inputs: LossInputs,
    options: LossOptions,
    weight: Tensor,
    residual: Tensor,
    row_scale: Tensor,
    sign: Tensor | None,
    wanted: Wanted,
    feature_gradient: Tensor | None = None,
    arrived: Tensor | None = None,
) -> Results:
    """One launch; ∂L/∂W as partials, the others added up. `arrived` becomes 0.

    `feature_gradient` is ∂L/∂h in the compute dtype: with it a diagonal Σ's part of ∂L/∂W is there.
    """
    configuration, sizes = current_configuration(weight.device), Sizes.of(inputs)
    rows_per_split, splits = (
        configuration.split_rows,
        max(1, cdiv(sizes.N, configuration.split_rows)),
    )
    tile, quadratic = configuration.grad_weight, None
    diagonal = Diagonal.of(inputs, weight) if wanted.weight else None
    if diagonal is not None and feature_gradient is not None:
        quadratic = DiagonalGradient(diagonal, feature_gradient, split(options.alpha))
        tile = configuration.tile_of("diagonal_weight", sizes.C, sizes.A, weight.dtype)
    sums_tile, features_tile = configuration.class_sums, configuration.grad_features
    sums = features = head = None
    if wanted.sums:
        sums = Grid(*sums_tile.grid(sizes.C, sizes.C), splits)
    if wanted.features is not None or wanted.epsilon:
        features = Grid(*features_tile.grid(sizes.N, sizes.A), 1)
    if wanted.weight or wanted.bias:
        rows, columns = tile.grid(sizes.C, sizes.A)
        head = Grid(rows, columns if wanted.weight else 1, splits)

    def empty(is_wanted: bool, parts: int, *size: int) -> Tensor | None:
        if not is_wanted:
            return None
        return weight.new_empty(size if parts == 1 else (parts, *size))

    grad_features = None
    if wanted.features is not None:
        grad_features = weight.new_empty(sizes.N, sizes.A, dtype=wanted.features)
    results = Results(
        sums=empty(wanted.sums, splits, sizes.C, sizes.C),
        features=grad_features,
        epsilon=empty(wanted.epsilon, 1 if features is None else features.columns, sizes.N),
        weight=empty(wanted.weight, splits, sizes.C, sizes.A),
        bias=empty(wanted.bias, splits, sizes.C),
    )
    grids = sums, features, head
    programs = sum(g.rows * g.columns * g.splits for g in grids if g is not None)
    launch(
        head_backward_kernel, (programs,),
        residual, row_scale, weight, Samples.of(inputs, sign), Labels.of(inputs, options),
        quadratic, split(options.alpha), results, arrived,
        0 if arrived is None else arrived.numel(), *grids, sizes, rows_per_split,
        like=weight, tile=tile, SCALE_STRIDE=int(row_scale.numel() > 1),
        B=_blocks(sums_tile, features_tile, tile),
    )  # fmt: skip
    return results._replace(
        sums=add_parts(results.sums, 2),
        epsilon=add_parts(results.epsilon, 1),
        bias=add_parts(results.bias, 1),
    )


@functools.cache
def _blocks(*tiles: Tile) -> Blocks:
    sizes = (size for tile in tiles for size in (tile.rows, tile.columns, tile.depth))
    return Blocks(*map(tl.constexpr, sizes))  # as plain int they cannot be shapes in Triton 3.6


def grad_variances(
    residual: Tensor, row_scale: Tensor, groups: Groups, weight: Tensor, alpha: float
) -> Tensor:
    """∂L/∂Σ (C, A) of a diagonal Σ; 0 for classes without samples."""
    tile, (num_classes, width) = current_configuration(weight.device).statistics, weight.shape
    grad = torch.empty_like(weight)
    launch(
        grad_variances_kernel, (num_classes, cdiv(width, tile.columns)),
        residual, row_scale, groups, weight, grad, split(alpha), num_classes, width,
        like=weight, tile=tile, SCALE_STRIDE=int(row_scale.numel() > 1),
        BLOCK_J=tile.rows, BLOCK_A=tile.columns,
    )  # fmt: skip
    return grad


def add_parts(partials: Tensor | None, axes: int) -> Tensor | None:
    """The result, of so many axes; a single part, which has no more, is that."""
    if partials is None or partials.dim() == axes:
        return partials
    return partials.sum(dim=0)
