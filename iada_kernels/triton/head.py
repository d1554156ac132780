"""The head forward: z̃, the loss and D, by tiles of samples and classes.

    logits   z  = h Wᵀ + b                                          (N, C)
    sign     s  = sign(Σ_{j≠y} r_j w_j − w_y),  r = softmax of z over j ≠ y    (N, A) int8
    logits   z̃ = (h + ε s) Wᵀ + b + α R[y] + β log π                over z
    softmax  ℓ  = logsumexp(z̃) − z̃_y,  D = softmax(z̃) − onehot(y)     D over z̃
    loss     the sum of ℓ in order, divided by the rows that count

Without ε the first logits and the sign fall away. For a diagonal Σ, R is part of the logits' own
product, ½ [σ·w_j² − 2 (σ∘w_y)·w_j + σ·w_y²] with W centred, because a common offset of its rows
would cancel; for a full Σ the class pass gives R (C, C).

First logits and sign share their launches with the statistics, see `forward`. z̃, softmax and loss
are one launch: where a program has all classes of its rows it goes on with them, otherwise the
last one of the rows does, and the last of all adds up ℓ. Where a row has so many classes that one
program would hold up the others, or several tiles and Σ is diagonal, softmax and loss have a launch
of their own.

A row that does not count has D = 0 and ℓ = 0. A label that is no class makes its loss NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.layout import contiguous_as
from iada_kernels.triton.config import Configuration, Tile, cdiv
from iada_kernels.triton.device import (
    load_epsilon,
    load_labels,
    load_samples,
    load_table,
    load_tile,
    number,
    samples_at,
    softmax_sums,
    store_tile,
    tile_at,
    wait_for_memory,
)
from iada_kernels.triton.launch import Number, current_configuration, launch, split
from iada_kernels.triton.records import Diagonal, Labels, Samples, Sizes, Table


class Terms(NamedTuple):
    """What is added to z = h Wᵀ + b; alpha also weighs the quadratic term of a diagonal Σ."""

    table: Table | None
    alpha: Number
    log_prior: Tensor | None
    beta: Number


class Reduction(NamedTuple):
    """The loss () and what its mean multiplies by (1)."""

    loss: Tensor
    inv_count: Tensor


@triton.jit
def logits_tile(
    samples, weight, bias, labels, diagonal, table, alpha, log_prior, beta, row, column, sizes,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of z̃ (or z); `store_logits` puts it into memory."""
    N, C, A = sizes
    rows, row_mask = tile_at(row, BLOCK_N, N)
    offs_c, col_mask = tile_at(column, BLOCK_C, C)
    eps = load_epsilon(samples, rows, row_mask, ACC)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
    if diagonal is not None:
        y, _ = load_labels(labels, rows, row_mask, C)
        label = tl.maximum(y, 0)
        squares = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
        constant = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        offs_a = first + tl.arange(0, BLOCK_A)
        k_mask = offs_a < A
        x = load_samples(samples, eps, rows, offs_a, row_mask, k_mask, A, ACC)
        w = load_tile(weight, offs_c, A, offs_a, col_mask, k_mask, ACC)
        total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
        if diagonal is not None:
            mean_w = tl.load(diagonal.weight_mean + offs_a, mask=k_mask, other=0.0)
            sigma = load_tile(diagonal.variances, label, A, offs_a, row_mask, k_mask, ACC)
            w_label = load_tile(weight, label, A, offs_a, row_mask, k_mask, ACC) - mean_w[None, :]
            w = tl.where(col_mask[:, None], w - mean_w[None, :], 0.0)
            squares = tl.dot(sigma, tl.trans(w * w), squares, input_precision=DOT, out_dtype=ACC)
            sigma *= w_label
            squares = tl.dot(-2 * sigma, tl.trans(w), squares, input_precision=DOT, out_dtype=ACC)
            constant += tl.sum(sigma * w_label, axis=1)
    if bias is not None:
        total += tl.load(bias + offs_c, mask=col_mask, other=0.0)[None, :]
    if diagonal is not None:
        form = tl.where(offs_c[None, :] == y[:, None], 0.0, 0.5 * (squares + constant[:, None]))
        total += number(alpha, ACC) * form
    if table is not None:
        y, _ = load_labels(labels, rows, row_mask, C)  # only here: the product needs the registers
        form = load_table(table, y, offs_c, row_mask, col_mask, ACC)
        total += number(alpha, ACC) * form
    if log_prior is not None:
        prior = tl.load(log_prior + offs_c, mask=col_mask, other=0.0)
        total += number(beta, ACC) * prior[None, :]
    return total


@triton.jit
def store_logits(
    z, total, row, column, sizes, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    N, C, _ = sizes
    rows, row_mask = tile_at(row, BLOCK_N, N)
    offs_c, col_mask = tile_at(column, BLOCK_C, C)
    store_tile(z, rows, C, offs_c, row_mask, col_mask, total)


@triton.jit
def sign_tile(
    z, weight, labels, sign, row, column, sizes,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask, y, _ = samples_at(labels, row, BLOCK_N, N, C)
    label = tl.maximum(y, 0)
    offs_a, col_mask = tile_at(column, BLOCK_A, A)
    row_max = tl.full([BLOCK_N], float("-inf"), dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, C, offs_c, row_mask, offs_c < C, ACC)
        other_mask = (offs_c < C)[None, :] & (offs_c[None, :] != label[:, None])
        row_max = tl.maximum(row_max, tl.max(tl.where(other_mask, tile, float("-inf")), axis=1))
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.zeros([BLOCK_N], dtype=ACC)
    mixture = tl.zeros([BLOCK_N, BLOCK_A], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, C, offs_c, row_mask, offs_c < C, ACC)
        other_mask = (offs_c < C)[None, :] & (offs_c[None, :] != label[:, None])
        r = tl.exp(tl.where(other_mask, tile - row_max[:, None], float("-inf")))
        total += tl.sum(r, axis=1)
        w = load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC)
        mixture = tl.dot(r, w, mixture, input_precision=DOT, out_dtype=ACC)
    # Scale-free: the sign of mixture − total·w_y, so that nothing is divided.
    g = mixture / tl.where(total > 0, total, 1.0)[:, None]
    g -= load_tile(weight, label, A, offs_a, row_mask, col_mask, ACC)
    s = (g > 0).to(tl.int8) - (g < 0).to(tl.int8)
    if C == 1:
        s = tl.zeros([BLOCK_N, BLOCK_A], dtype=tl.int8)
    store_tile(sign, rows, A, offs_a, row_mask, col_mask, s)


@triton.jit
def _softmax_tile(
    total, z, labels, losses, row, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """ℓ and D of rows whose z̃ are all in `total`."""
    rows, row_mask, y, wrong = samples_at(labels, row, BLOCK_N, N, C)
    offs_c, col_mask = tile_at(0, BLOCK_C, C)
    is_label = offs_c[None, :] == y[:, None]
    z_label = tl.sum(tl.where(is_label, total, 0.0), axis=1)
    total = tl.where(col_mask[None, :], total, float("-inf"))
    row_max = tl.max(total, axis=1)
    p = tl.exp(total - row_max[:, None])
    row_sum = tl.sum(p, axis=1)
    loss = tl.where(y >= 0, tl.log(row_sum) + (row_max - z_label), 0.0)
    tl.store(losses + rows, tl.where(wrong, float("nan"), loss), mask=row_mask)
    p = tl.where((y >= 0)[:, None] & (is_label == 0), p / row_sum[:, None], 0.0)
    # D_y = −Σ_{j≠y} p_j keeps the digits that p_y − 1 loses on a confident sample.
    p = tl.where(is_label, -tl.sum(p, axis=1)[:, None], p)
    store_tile(z, rows, C, offs_c, row_mask, col_mask, p)


@triton.jit
def _softmax_rows(
    z, labels, losses, row, N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ℓ of a tile of rows, and D in place of their z̃, as `_softmax_tile`."""
    rows, row_mask, y, wrong = samples_at(labels, row, BLOCK_N, N, C)
    label_ptrs = z + rows.to(tl.int64) * C + tl.maximum(y, 0)
    z_label = tl.load(label_ptrs, mask=row_mask, other=0.0, cache_modifier=CACHE)
    row_max, total = softmax_sums(z, rows, C, row_mask, C, BLOCK_N, BLOCK_C, ACC, CACHE)
    loss = tl.where(y >= 0, tl.log(total) + (row_max - z_label), 0.0)
    tl.store(losses + rows, tl.where(wrong, float("nan"), loss), mask=row_mask)
    others = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, C, offs_c, row_mask, offs_c < C, ACC, CACHE)
        p = tl.exp(tile - row_max[:, None]) / total[:, None]
        other_mask = (offs_c < C)[None, :] & (y >= 0)[:, None] & (offs_c[None, :] != y[:, None])
        p = tl.where(other_mask, p, 0.0)
        others += tl.sum(p, axis=1)
        ptrs = z + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask = row_mask[:, None] & (offs_c < C)[None, :]
        tl.store(ptrs, p, mask=mask & (offs_c[None, :] != y[:, None]))
    tl.store(label_ptrs, -others, mask=row_mask & (y >= 0))


@triton.jit
def _reduce_if_last(
    losses, labels, reduction, arrived, N,
    MEAN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """By the last tile of rows: the sum of the losses in order, or the mean of those that count."""
    wait_for_memory()
    tl.debug_barrier()  # the losses of this program are there before it counts
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = tl.zeros([BLOCK], dtype=ACC)
        count = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, N, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            # Other multiprocessors stored them: past the first-level cache.
            total += tl.load(losses + rows, mask=rows < N, other=0.0, cache_modifier=".cg")
            y = tl.load(labels.classes + rows, mask=rows < N, other=0)
            count += ((rows < N) & (y != labels.ignore_index)).to(tl.int32)
        inv = tl.cast(1.0, ACC)
        if MEAN:
            inv /= tl.maximum(tl.sum(count, axis=0), 1)
        tl.store(reduction.loss, tl.sum(total, axis=0) * inv)
        tl.store(reduction.inv_count, inv)


@triton.jit
def logits_kernel(
    samples, weight, bias, labels, diagonal, terms, z, losses, reduction, arrived, sizes,
    ALONE: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ALONE: a program has all classes of its rows. Otherwise one takes ROWS at a time."""
    N, C, _ = sizes
    row, column = tl.program_id(0), tl.program_id(1)
    total = logits_tile(
        samples, weight, bias, labels, diagonal,
        terms.table, terms.alpha, terms.log_prior, terms.beta, row, column, sizes,
        BLOCK_N, BLOCK_C, BLOCK_A, ACC, DOT,
    )  # fmt: skip
    if losses is None:
        store_logits(z, total, row, column, sizes, BLOCK_N, BLOCK_C)
    elif ALONE:
        _softmax_tile(total, z, labels, losses, row, N, C, BLOCK_N, BLOCK_C)
        if reduction is not None:
            _reduce_if_last(losses, labels, reduction, arrived + C, N, MEAN, BLOCK, ACC)
    else:
        store_logits(z, total, row, column, sizes, BLOCK_N, BLOCK_C)
        wait_for_memory()
        tl.debug_barrier()  # this tile of z̃ is there before the program counts
        before = tl.atomic_add(arrived + C + 1 + row, 1, sem="acq_rel")
        if before == tl.num_programs(1) - 1:
            for part in range(BLOCK_N // ROWS):
                index = row * (BLOCK_N // ROWS) + part
                # Other multiprocessors stored z̃: past the first-level cache.
                _softmax_rows(z, labels, losses, index, N, C, ROWS, BLOCK_C, ".cg", ACC)
            if reduction is not None:
                _reduce_if_last(losses, labels, reduction, arrived + C, N, MEAN, BLOCK, ACC)


@triton.jit
def softmax_kernel(
    z, labels, losses, reduction, arrived, N, C,
    MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    _softmax_rows(z, labels, losses, tl.program_id(0), N, C, BLOCK_N, BLOCK_C, "", ACC)
    if reduction is not None:
        _reduce_if_last(losses, labels, reduction, arrived + C, N, MEAN, BLOCK, ACC)


def logits_tile_of(configuration: Configuration, inputs: LossInputs) -> Tile:
    """The tile of z̃."""
    if inputs.covariance is None or inputs.has_full_covariance:
        return configuration.logits
    count, width = inputs.features.shape
    return configuration.tile_of("diagonal_logits", count, width, inputs.compute_dtype)


def head_loss(
    z: Tensor,
    inputs: LossInputs,
    options: LossOptions,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
    labels: Labels,
    table: Tensor | None,
    arrived: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The loss, (N) or (), and what the mean multiplies by, (1) or None; z (N, C) becomes D.

    One launch, two where C is large. `weight` and `bias` are in the compute dtype, `table` is R
    (C, C) of a full Σ, `arrived` are the counters of `forward`, at 0.
    """
    configuration, sizes = current_configuration(weight.device), Sizes.of(inputs)
    losses, reduction = z.new_empty(sizes.N), None
    if options.reduction != "none":
        reduction = Reduction(z.new_empty(()), z.new_empty(1))
        if sizes.N == 0:  # no program would arrive
            return reduction.loss.zero_(), reduction.inv_count.fill_(1)
    log_prior = contiguous_as(inputs.log_prior, weight.dtype)
    terms = Terms(Table.of(table), split(options.alpha), log_prior, split(options.beta))
    tile, is_mean = logits_tile_of(configuration, inputs), options.reduction == "mean"
    grid, softmax = tile.grid(sizes.N, sizes.C), (losses, reduction, arrived)
    is_alone, diagonal = grid[1] == 1, Diagonal.of(inputs, weight)
    # Beside the products of a diagonal Σ another loop would not find registers.
    has_room = is_alone or diagonal is None
    is_joined = has_room and configuration.softmax_classes >= sizes.C
    launch(
        logits_kernel, grid,
        samples, weight, bias, labels,
        diagonal, terms, z, *(softmax if is_joined else (None,) * 3), sizes,
        like=weight, tile=tile, ALONE=is_alone, MEAN=is_mean,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth,
        ROWS=tile.warps,  # so that one warp adds a row up, in few registers
        BLOCK=configuration.group,
    )  # fmt: skip
    if not is_joined:
        tile = configuration.softmax
        launch(
            softmax_kernel, (cdiv(sizes.N, tile.rows),),
            z, labels, *softmax, sizes.N, sizes.C,
            like=z, tile=tile, MEAN=is_mean,
            BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK=configuration.group,
        )  # fmt: skip
    return (losses, None) if reduction is None else (reduction.loss, reduction.inv_count)
