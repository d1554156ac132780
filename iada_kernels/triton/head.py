"""The head forward: z̃, the loss and D, by three kernels over tiles of samples and classes.

    logits   z  = h Wᵀ + b                                          (N, C)
    sign     s  = sign(Σ_{j≠y} r_j w_j − w_y),  r = softmax of z over j ≠ y    (N, A) int8
    logits   z̃ = (h + ε s) Wᵀ + b + α R[y] + β log π                over z
    softmax  ℓ  = logsumexp(z̃) − z̃_y,  D = softmax(z̃) − onehot(y)     D over z̃
             the program that finishes last adds ℓ in order, divided by the rows that count

Without ε the first logits and the sign fall away. For a diagonal Σ, R is part of the logits' own
product, ½ [σ·w_j² − 2 (σ∘w_y)·w_j + σ·w_y²] with W centred, because a common offset of its rows
would cancel; for a full Σ the class pass gives R (C, C).

A row that does not count has D = 0 and ℓ = 0. A label that is no class makes its loss NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.layout import contiguous_as
from iada_kernels.triton.config import cdiv
from iada_kernels.triton.device import (
    load_epsilon,
    load_samples,
    load_table,
    load_tile,
    number,
    sample_axis,
    softmax_sums,
    store_tile,
    tile_axis,
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
    """The loss (), what its mean multiplies by (1), and the programs that have arrived (1)."""

    loss: Tensor
    inv_count: Tensor
    arrived: Tensor  # int32, 0 before


class Logits(NamedTuple):
    """z̃ (N, C), s (N, A) int8 where there is an ε, and a counter for `reduce_losses`, at 0."""

    z: Tensor
    sign: Tensor | None
    arrived: Tensor


@triton.jit
def logits_kernel(
    samples, weight, bias, labels, diagonal, terms, z, sizes, arrived,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    if arrived is not None:  # for the softmax, which comes after
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(arrived, 0)
    rows, row_mask, y, _ = sample_axis(labels, BLOCK_N, N, C)
    label = tl.maximum(y, 0)
    offs_c, col_mask = tile_axis(1, BLOCK_C, C)
    eps = load_epsilon(samples, rows, row_mask, ACC)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
    if diagonal is not None:
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
        total += number(terms.alpha, ACC) * form
    if terms.table is not None:
        form = load_table(terms.table, y, offs_c, row_mask, col_mask, ACC)
        total += number(terms.alpha, ACC) * form
    if terms.log_prior is not None:
        prior = tl.load(terms.log_prior + offs_c, mask=col_mask, other=0.0)
        total += number(terms.beta, ACC) * prior[None, :]
    store_tile(z, rows, C, offs_c, row_mask, col_mask, total)


@triton.jit
def sign_kernel(
    z, weight, labels, sign, sizes,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask, y, _ = sample_axis(labels, BLOCK_N, N, C)
    label = tl.maximum(y, 0)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
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
def _reduce(
    losses, labels, reduction, N, MEAN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """The sum of the losses in their order, or their mean over the rows that count."""
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
def softmax_kernel(
    z, labels, losses, reduction, N, C,
    MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    rows, row_mask, y, wrong = sample_axis(labels, BLOCK_N, N, C)
    z_label = tl.load(z + rows.to(tl.int64) * C + tl.maximum(y, 0), mask=row_mask, other=0.0)
    row_max, total = softmax_sums(z, rows, C, row_mask, C, BLOCK_N, BLOCK_C, ACC)
    loss = tl.where(y >= 0, tl.log(total) + (row_max - z_label), 0.0)
    tl.store(losses + rows, tl.where(wrong, float("nan"), loss), mask=row_mask)
    # D_y = −Σ_{j≠y} p_j keeps the digits that p_y − 1 loses on a confident sample.
    others = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, C, offs_c, row_mask, offs_c < C, ACC)
        p = tl.exp(tile - row_max[:, None]) / total[:, None]
        other_mask = (offs_c < C)[None, :] & (y >= 0)[:, None] & (offs_c[None, :] != y[:, None])
        p = tl.where(other_mask, p, 0.0)
        others += tl.sum(p, axis=1)
        ptrs = z + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask = row_mask[:, None] & (offs_c < C)[None, :]
        tl.store(ptrs, p, mask=mask & (offs_c[None, :] != y[:, None]))
    tl.store(z + rows.to(tl.int64) * C + tl.maximum(y, 0), -others, mask=row_mask & (y >= 0))
    if reduction is not None:
        tl.debug_barrier()  # the losses of this program are there before it counts
        if tl.atomic_add(reduction.arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            _reduce(losses, labels, reduction, N, MEAN, BLOCK, ACC)


def adjusted_logits(
    inputs: LossInputs, options: LossOptions, weight: Tensor, table: Tensor | None
) -> Logits:
    """Two launches and that of the sign; `weight` in the compute dtype, R (C, C) of a full Σ."""
    z = weight.new_empty(len(inputs.labels), len(weight))
    arrived = torch.empty(1, dtype=torch.int32, device=weight.device)
    terms = Terms(None, split(options.alpha), None, split(options.beta))
    sign = None
    if inputs.epsilon is not None:
        _logits(z, inputs, options, weight, None, None, terms, arrived)
        sign = torch.empty(inputs.features.shape, dtype=torch.int8, device=weight.device)
        tile = current_configuration(weight.device).sign
        launch(
            sign_kernel, tile.grid(*sign.shape),
            z, weight, Labels.of(inputs, options), sign, Sizes.of(inputs),
            like=weight, tile=tile, BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
        )  # fmt: skip
    log_prior = contiguous_as(inputs.log_prior, weight.dtype)
    terms = terms._replace(table=Table.of(table), log_prior=log_prior)
    counter = arrived if sign is None else None
    _logits(z, inputs, options, weight, sign, Diagonal.of(inputs, weight), terms, counter)
    return Logits(z, sign, arrived)


def _logits(
    z: Tensor,
    inputs: LossInputs,
    options: LossOptions,
    weight: Tensor,
    sign: Tensor | None,
    diagonal: Diagonal | None,
    terms: Terms,
    arrived: Tensor | None,
) -> None:
    """(h + ε s) Wᵀ + b and the terms given, into `z`; `arrived`, if given, becomes 0."""
    configuration = current_configuration(weight.device)
    tile = configuration.logits if diagonal is None else configuration.diagonal_logits
    launch(
        logits_kernel, tile.grid(*z.shape),
        Samples.of(inputs, sign), weight, contiguous_as(inputs.bias, weight.dtype),
        Labels.of(inputs, options), diagonal, terms, z, Sizes.of(inputs), arrived,
        like=weight, tile=tile, BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth,
    )  # fmt: skip


def reduce_losses(logits: Logits, labels: Labels, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The loss, (N) or (), and what the mean multiplies by, (1) or None; z becomes D in place.

    One launch. The logits serve once, because their counter does.
    """
    z = logits.z
    configuration = current_configuration(z.device)
    tile, losses, reduced = configuration.softmax, z.new_empty(len(z)), None
    if reduction != "none":
        reduced = Reduction(z.new_empty(()), z.new_empty(1), logits.arrived)
        if len(z) == 0:  # no program would arrive
            return reduced.loss.zero_(), reduced.inv_count.fill_(1)
    launch(
        softmax_kernel, (cdiv(len(z), tile.rows),),
        z, labels, losses, reduced, *z.shape,
        like=z, tile=tile, MEAN=reduction == "mean",
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK=configuration.group,
    )  # fmt: skip
    return (losses, None) if reduced is None else (reduced.loss, reduced.inv_count)
