"""The class pass: one pass over each class's full Σ updates it and gives the quadratic forms.

    Σ_c ← a_c Σ_c + (a rank-K term)                 optional, in place
    R[c, j] = ½ (w_j − w_c)ᵀ Σ_c (w_j − w_c)         optional, of the updated Σ
    Ṙ[c, j] = (w_j − w_c)ᵀ Σ_c (V_j − V_c)           optional, its derivative along V

A program holds the tile Σ_ik and, off the diagonal, its mirror Σ_ki: a quadratic form sees only
Σ_ik + Σ_kiᵀ, so that one product serves both, whether or not Σ is symmetric.

    ┌──────┬──────┬──────┐   read  Σ_ik and Σ_ki, W (and V) in columns i and k
    │ 0,0  │      │ ki   │   write both, updated; a partial sum of R[c, :]
    ├──────┼──────┼──────┤
    │ 1,0  │ 1,1  │      │   partial p = i(i+1)/2 + k; a class's last program adds them in order,
    ├──────┼──────┼──────┤   so that the result does not depend on who finishes first
    │ ik   │ 2,1  │ 2,2  │
    └──────┴──────┴──────┘

Rank-K terms, by UPDATE:
    STREAM      a = 1 − w,  (w/m) (X − μ′)ᵀ(X − μ′) + w(1−w) shift shiftᵀ          rows X of class c
    ACCUMULATE  a = 1,  scale Σ_j [ D_cj sym((w_j−w_c)(V_j−V_c)ᵀ) + ½ G_cj (w_j−w_c)(w_j−w_c)ᵀ ]
    OVERWRITE   the same with a = 0: Σ_c is written, not read; classes without rows become 0

covariance (C, A, A) · weight W and tangent V (C, A) · residual D and curvature G (C, C) ·
partials (C, P, C) with P = T(T+1)/2, T tiles along A. Classes without rows cost nothing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.config import Tile, cdiv, next_power_of_2
from iada_kernels.triton.device import (
    load_tile,
    number,
    wait_for_memory,
)
from iada_kernels.triton.launch import Number, current_configuration, launch, split
from iada_kernels.triton.moments import Moments
from iada_kernels.triton.records import Samples
from iada_kernels.triton.rows import Groups

NONE, STREAM, ACCUMULATE, OVERWRITE = 0, 1, 2, 3


# Kernels read globals only as constants.
_STREAM, _ACCUMULATE, _OVERWRITE = (
    tl.constexpr(STREAM),
    tl.constexpr(ACCUMULATE),
    tl.constexpr(OVERWRITE),
)


class HeadWeight(NamedTuple):
    """W and the direction V in which it moves, (C, A) each; V None for 0."""

    weight: Tensor | None
    tangent: Tensor | None


class Partials(NamedTuple):
    """Parts (C, P, C) of R, and of Ṙ if there is a tangent; P of them a class.

    Where P > 1 their sums too, and for each class (C) the programs that have arrived, 0 before.
    """

    table: Tensor
    table_tangent: Tensor | None
    P: int
    total: Tensor | None
    total_tangent: Tensor | None
    arrived: Tensor | None


class RankC(NamedTuple):
    """What ACCUMULATE and OVERWRITE add: D (C, C), None without a tangent, G (C, C), scale."""

    residual: Tensor | None
    curvature: Tensor
    scale: Number


@triton.jit
def _streamed(
    s, samples, order, m, w, center, shift, left, right, A,
    same, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Σ_ik after the streaming update, and the increment alone for its mirror."""
    left_mask, right_mask = left < A, right < A
    center_left = tl.load(center + left, mask=left_mask, other=0.0)
    center_right = tl.load(center + right, mask=right_mask, other=0.0)
    scatter = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        k_mask = at < m
        rows = tl.load(order + at, mask=k_mask, other=0)
        x = load_tile(samples.features, rows, samples.stride, left, k_mask, left_mask, ACC)
        x = tl.where(k_mask[:, None], x - center_left[None, :], 0.0)
        y = load_tile(samples.features, rows, samples.stride, right, k_mask, right_mask, ACC)
        y = tl.where(k_mask[:, None], y - center_right[None, :], 0.0)
        scatter = tl.dot(tl.trans(x), y, scatter, input_precision=DOT, out_dtype=ACC)
    shift_left = tl.load(shift + left, mask=left_mask, other=0.0)
    shift_right = tl.load(shift + right, mask=right_mask, other=0.0)
    if same:  # on the diagonal the two halves differ by rounding
        scatter = 0.5 * (scatter + tl.trans(scatter))
    scatter = (w / m) * scatter + (w * (1 - w)) * (shift_left[:, None] * shift_right[None, :])
    return (1 - w) * s + scatter, scatter


@triton.jit
def _rank_c_term(
    head, rank_c, c, left, right, C, A, same,
    BLOCK_A: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Tile ik of Σ_j [ D_cj sym(Δ_j Γ_jᵀ) + ½ G_cj Δ_j Δ_jᵀ ], Δ_j = w_j − w_c, Γ_j = V_j − V_c."""
    left_mask, right_mask = left < A, right < A
    label_left = tl.load(head.weight + c * A + left, mask=left_mask, other=0.0)
    label_right = tl.load(head.weight + c * A + right, mask=right_mask, other=0.0)
    term = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
    for start in range(0, C, BLOCK_J):
        offs_c = start + tl.arange(0, BLOCK_J)
        k_mask = offs_c < C
        g = tl.load(rank_c.curvature + c * C + offs_c, mask=k_mask, other=0.0)
        p = load_tile(head.weight, offs_c, A, left, k_mask, left_mask, ACC) - label_left[None, :]
        q = load_tile(head.weight, offs_c, A, right, k_mask, right_mask, ACC) - label_right[None, :]
        p = tl.where(k_mask[:, None], p, 0.0)
        if head.tangent is None:
            scaled = 0.5 * g[:, None] * q
            term = tl.dot(tl.trans(p), scaled, term, input_precision=DOT, out_dtype=ACC)
        else:
            d = tl.load(rank_c.residual + c * C + offs_c, mask=k_mask, other=0.0)
            dV = load_tile(head.tangent, offs_c, A, right, k_mask, right_mask, ACC)
            dV -= tl.load(head.tangent + c * A + right, mask=right_mask, other=0.0).to(ACC)[None, :]
            scaled = 0.5 * (d[:, None] * dV + g[:, None] * q)
            term = tl.dot(tl.trans(p), scaled, term, input_precision=DOT, out_dtype=ACC)
            dV = load_tile(head.tangent, offs_c, A, left, k_mask, left_mask, ACC)
            dV -= tl.load(head.tangent + c * A + left, mask=left_mask, other=0.0).to(ACC)[None, :]
            dV = tl.where(k_mask[:, None], 0.5 * d[:, None] * dV, 0.0)
            term = tl.dot(tl.trans(dV), q, term, input_precision=DOT, out_dtype=ACC)
    if same:
        term = 0.5 * (term + tl.trans(term))
    return term


@triton.jit
def _add_partials(table, total, c, C, P, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """A row of R from its parts, in their order."""
    for first in range(0, C, BLOCK):
        offs_c = first + tl.arange(0, BLOCK)
        row = tl.zeros([BLOCK], dtype=ACC)
        for p in range(P):  # other multiprocessors stored them: past the first-level cache
            ptrs = table + (c * P + p) * C + offs_c
            row += tl.load(ptrs, mask=offs_c < C, other=0.0, cache_modifier=".cg")
        tl.store(total + c * C + offs_c, row, mask=offs_c < C)


@triton.jit
def class_pass_kernel(
    covariance, head, groups, partials, samples, moments, rank_c, C, A,
    UPDATE: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(A, BLOCK_A)
    i = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles
    if k > i:
        return
    c = tl.program_id(1).to(tl.int64)
    m = tl.load(groups.size + c)
    if (m == 0) and (UPDATE != _OVERWRITE):
        return
    left, right = i * BLOCK_A + tl.arange(0, BLOCK_A), k * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (left < A)[:, None] & (right < A)[None, :]
    ptrs = covariance + c * A * A + left.to(tl.int64)[:, None] * A + right[None, :]
    mirror_ptrs = covariance + c * A * A + right.to(tl.int64)[:, None] * A + left[None, :]

    if UPDATE == _OVERWRITE:
        s = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
        mirror = s
    else:
        s = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        mirror = s
        if k < i:
            mirror = tl.trans(tl.load(mirror_ptrs, mask=tl.trans(mask), other=0.0).to(ACC))

    if UPDATE == _STREAM:
        w = tl.load(moments.batch_weight + c)
        s, scatter = _streamed(
            s, samples, groups.order + tl.load(groups.start + c), m, w,
            moments.center + c * A, moments.shift + c * A,
            left, right, A, i == k, BLOCK_K, BLOCK_A, ACC, DOT,
        )  # fmt: skip
        mirror = (1 - w) * mirror + scatter
    if UPDATE >= _ACCUMULATE:
        if m > 0:
            term = number(rank_c.scale, ACC) * _rank_c_term(
                head, rank_c, c, left, right, C, A, i == k, BLOCK_A, BLOCK_J, ACC, DOT
            )
            s += term
            mirror += term
    if UPDATE != 0:
        tl.store(ptrs, s, mask=mask)
        if k < i:
            tl.store(mirror_ptrs, tl.trans(mirror), mask=tl.trans(mask))

    if TABLE:
        both = s
        if k < i:
            both = s + mirror
        label_left = tl.load(head.weight + c * A + left, mask=left < A, other=0.0)
        label_right = tl.load(head.weight + c * A + right, mask=right < A, other=0.0)
        partial = (c * partials.P + i * (i + 1) // 2 + k) * C
        for first in range(0, C, BLOCK_J):
            offs_c = first + tl.arange(0, BLOCK_J)
            k_mask = offs_c < C
            p = load_tile(head.weight, offs_c, A, left, k_mask, left < A, ACC) - label_left[None, :]
            q = (
                load_tile(head.weight, offs_c, A, right, k_mask, right < A, ACC)
                - label_right[None, :]
            )
            product = tl.dot(p, both, input_precision=DOT, out_dtype=ACC)
            form = 0.5 * tl.sum(product * q, axis=1)
            tl.store(partials.table + partial + offs_c, form, mask=k_mask)
            if head.tangent is not None:
                dV = load_tile(head.tangent, offs_c, A, right, k_mask, right < A, ACC)
                dV -= tl.load(head.tangent + c * A + right, mask=right < A, other=0.0).to(ACC)[
                    None, :
                ]
                form = tl.sum(product * dV, axis=1)
                dV = load_tile(head.tangent, offs_c, A, left, k_mask, left < A, ACC)
                dV -= tl.load(head.tangent + c * A + left, mask=left < A, other=0.0).to(ACC)[
                    None, :
                ]
                product = tl.dot(dV, both, input_precision=DOT, out_dtype=ACC)
                form += tl.sum(product * q, axis=1)
                tl.store(partials.table_tangent + partial + offs_c, 0.5 * form, mask=k_mask)
        if partials.total is not None:
            wait_for_memory()
            tl.debug_barrier()  # the parts of this program are there before it counts
            if tl.atomic_add(partials.arrived + c, 1, sem="acq_rel") == partials.P - 1:
                P = partials.P
                _add_partials(partials.table, partials.total, c, C, P, BLOCK_C, ACC)
                if partials.total_tangent is not None:
                    _add_partials(
                        partials.table_tangent, partials.total_tangent, c, C, P, BLOCK_C, ACC
                    )


def stream_and_table(
    covariance: Tensor,
    head: HeadWeight | None,
    groups: Groups,
    samples: Samples | None = None,
    moments: Moments | None = None,
    arrived: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The streaming update if `moments` are given; R and Ṙ (C, C) if a `head` is. One launch.

    Rows of R for classes without samples are not written. With a head `arrived` is needed, a
    counter at 0 for each class, and is used up.
    """
    num_classes, width = covariance.shape[:2]
    configuration, dtype = current_configuration(covariance.device), covariance.dtype
    tile = configuration.class_pass.of(dtype)
    if head is not None and head.tangent is None:  # with which a large tile finds no registers
        tile = configuration.tile_of("class_pass", num_classes, width, dtype)
    tiles = cdiv(width, tile.rows)
    count = tiles * (tiles + 1) // 2
    update = NONE if moments is None else STREAM
    if head is None:
        _launch(tile, update, covariance, head, groups, None, samples, moments, None)
        return None, None

    def tables(*parts: int) -> tuple[Tensor, Tensor | None]:
        table = covariance.new_empty(num_classes, *parts, num_classes)
        return table, None if head.tangent is None else torch.empty_like(table)

    sums = tables()
    if count == 1:  # a single part is the sum
        partials = Partials(*sums, count, None, None, None)
    else:
        partials = Partials(*tables(count), count, *sums, arrived)
    _launch(tile, update, covariance, head, groups, partials, samples, moments, None)
    return sums


def rank_c_update(
    covariance: Tensor,
    head: HeadWeight,
    groups: Groups,
    curvature: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Σ += scale (rank-C term), UPDATE = ACCUMULATE; or Σ = with `overwrite`. One launch."""
    tile = current_configuration(covariance.device).rank_c_update.of(covariance.dtype)
    rank_c = RankC(residual, curvature, split(scale))
    update = OVERWRITE if overwrite else ACCUMULATE
    _launch(tile, update, covariance, head, groups, None, None, None, rank_c)


def _launch(tile: Tile, update: int, covariance: Tensor, *records: tuple | None) -> None:
    """`records` in the order of the kernel."""
    num_classes, width = covariance.shape[:2]
    launch(
        class_pass_kernel, (cdiv(width, tile.rows) ** 2, num_classes),
        covariance, *records, num_classes, width, like=covariance, tile=tile,
        UPDATE=update, TABLE=records[2] is not None,
        BLOCK_A=tile.rows, BLOCK_J=tile.columns, BLOCK_K=tile.depth,
        BLOCK_C=min(1024, next_power_of_2(num_classes)),
    )  # fmt: skip
