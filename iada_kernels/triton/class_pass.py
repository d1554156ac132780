"""The class pass: one pass over each class's full Σ updates it and gives the quadratic forms.

    Σ_c ← a_c Σ_c + (a rank-K term)                 optional, in place
    R[c, j] = ½ (w_j − w_c)ᵀ Σ_c (w_j − w_c)         optional, of the updated Σ
    Ṙ[c, j] = (w_j − w_c)ᵀ Σ_c (V_j − V_c)           optional, its derivative along V

A program holds the tile Σ_ik and, off the diagonal, its mirror Σ_ki: a quadratic form sees only
Σ_ik + Σ_kiᵀ, so that one product serves both, whether or not Σ is symmetric.

    ┌──────┬──────┬──────┐   read  Σ_ik and Σ_ki, W (and V) in columns i and k
    │ 0,0  │      │ ki   │   write both, updated; a part of R[c, :]
    ├──────┼──────┼──────┤
    │ 1,0  │ 1,1  │      │   part p = i(i+1)/2 + k; parts are added in order by a second kernel,
    ├──────┼──────┼──────┤   so that the result does not depend on who finishes first
    │ ik   │ 2,1  │ 2,2  │
    └──────┴──────┴──────┘

Rank-K terms, UPDATE:
    STREAM  a = 1 − w,  (w/m) (X − μ′)ᵀ(X − μ′) + w(1−w) shift shiftᵀ          rows X of class c
    META    a = 1,  scale Σ_j [ D_cj sym((w_j−w_c)(V_j−V_c)ᵀ) + ½ G_cj (w_j−w_c)(w_j−w_c)ᵀ ]
    FRESH   META with a = 0: Σ_c is written, not read; classes without rows become 0

covariance (C, A, A) · weight W and tangent V (C, A) · residual D and curvature G (C, C) ·
parts (C, P, C) with P = T(T+1)/2, T tiles along A. Classes without rows cost nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.config import Tile
from iada_kernels.triton.device import load_tile, number
from iada_kernels.triton.launch import (
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    split,
)
from iada_kernels.triton.rows import Groups

NONE, STREAM, META, FRESH = 0, 1, 2, 3


# Kernels read globals only as constants.
_STREAM, _META, _FRESH = tl.constexpr(STREAM), tl.constexpr(META), tl.constexpr(FRESH)


@triton.jit
def _streamed(
    s, features, stride, order, first, m, w, center, shift, left, right, A,
    same, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Σ_ik after the streaming update, and the increment alone for its mirror."""
    in_left, in_right = left < A, right < A
    center_left = tl.load(center + left, mask=in_left, other=0.0)
    center_right = tl.load(center + right, mask=in_right, other=0.0)
    grown = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        there = at < m
        rows = tl.load(order + first + at, mask=there, other=0)
        x = load_tile(features, rows, stride, left, there, in_left, ACC)
        x = tl.where(there[:, None], x - center_left[None, :], 0.0)
        y = load_tile(features, rows, stride, right, there, in_right, ACC)
        y = tl.where(there[:, None], y - center_right[None, :], 0.0)
        grown = tl.dot(tl.trans(x), y, grown, input_precision=DOT, out_dtype=ACC)
    shift_left = tl.load(shift + left, mask=in_left, other=0.0)
    shift_right = tl.load(shift + right, mask=in_right, other=0.0)
    if same:  # on the diagonal the two halves differ by rounding
        grown = 0.5 * (grown + tl.trans(grown))
    grown = (w / m) * grown + (w * (1 - w)) * (shift_left[:, None] * shift_right[None, :])
    return (1 - w) * s + grown, grown


@triton.jit
def _pair_term(
    weight, tangent, residual, curvature, c, left, right, C, A, same,
    BLOCK_A: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Tile ik of Σ_j [ D_cj sym(Δ_j Γ_jᵀ) + ½ G_cj Δ_j Δ_jᵀ ], Δ_j = w_j − w_c, Γ_j = V_j − V_c."""
    in_left, in_right = left < A, right < A
    own_left = tl.load(weight + c * A + left, mask=in_left, other=0.0)
    own_right = tl.load(weight + c * A + right, mask=in_right, other=0.0)
    term = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
    for start in range(0, C, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        there = j < C
        g = tl.load(curvature + c * C + j, mask=there, other=0.0)
        p = load_tile(weight, j, A, left, there, in_left, ACC) - own_left[None, :]
        q = load_tile(weight, j, A, right, there, in_right, ACC) - own_right[None, :]
        p = tl.where(there[:, None], p, 0.0)
        if tangent is None:
            scaled = 0.5 * g[:, None] * q
            term = tl.dot(tl.trans(p), scaled, term, input_precision=DOT, out_dtype=ACC)
        else:
            d = tl.load(residual + c * C + j, mask=there, other=0.0)
            turn = load_tile(tangent, j, A, right, there, in_right, ACC)
            turn -= tl.load(tangent + c * A + right, mask=in_right, other=0.0).to(ACC)[None, :]
            scaled = 0.5 * (d[:, None] * turn + g[:, None] * q)
            term = tl.dot(tl.trans(p), scaled, term, input_precision=DOT, out_dtype=ACC)
            turn = load_tile(tangent, j, A, left, there, in_left, ACC)
            turn -= tl.load(tangent + c * A + left, mask=in_left, other=0.0).to(ACC)[None, :]
            turn = tl.where(there[:, None], 0.5 * d[:, None] * turn, 0.0)
            term = tl.dot(tl.trans(turn), q, term, input_precision=DOT, out_dtype=ACC)
    if same:
        term = 0.5 * (term + tl.trans(term))
    return term


@triton.jit
def class_pass_kernel(
    covariance, weight, tangent, size, parts, tangent_parts,
    features, stride, order, start, share, center, shift,
    residual, curvature, scale, scale_low,
    C, A, P,
    UPDATE: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(A, BLOCK_A)
    i = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles
    if k > i:
        return
    c = tl.program_id(1).to(tl.int64)
    m = tl.load(size + c)
    if (m == 0) and (UPDATE != _FRESH):
        return
    left, right = i * BLOCK_A + tl.arange(0, BLOCK_A), k * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (left < A)[:, None] & (right < A)[None, :]
    here = covariance + c * A * A + left.to(tl.int64)[:, None] * A + right[None, :]
    mirror = covariance + c * A * A + right.to(tl.int64)[:, None] * A + left[None, :]

    if UPDATE == _FRESH:
        s = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
        other = s
    else:
        s = tl.load(here, mask=mask, other=0.0).to(ACC)
        other = s
        if k < i:
            other = tl.trans(tl.load(mirror, mask=tl.trans(mask), other=0.0).to(ACC))

    if UPDATE == _STREAM:
        w = tl.load(share + c)
        s, grown = _streamed(
            s, features, stride, order, tl.load(start + c), m, w,
            center + c * A, shift + c * A, left, right, A, i == k, BLOCK_K, BLOCK_A, ACC, DOT,
        )  # fmt: skip
        other = (1 - w) * other + grown
    if UPDATE >= _META:
        if m > 0:
            term = number(scale, scale_low, ACC) * _pair_term(
                weight, tangent, residual, curvature, c, left, right, C, A, i == k,
                BLOCK_A, BLOCK_J, ACC, DOT,
            )  # fmt: skip
            s += term
            other += term
    if UPDATE != 0:
        tl.store(here, s, mask=mask)
        if k < i:
            tl.store(mirror, tl.trans(other), mask=tl.trans(mask))

    if TABLE:
        both = s
        if k < i:
            both = s + other
        own_left = tl.load(weight + c * A + left, mask=left < A, other=0.0)
        own_right = tl.load(weight + c * A + right, mask=right < A, other=0.0)
        part = c * P + i * (i + 1) // 2 + k
        for first in range(0, C, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            there = j < C
            p = load_tile(weight, j, A, left, there, left < A, ACC) - own_left[None, :]
            q = load_tile(weight, j, A, right, there, right < A, ACC) - own_right[None, :]
            product = tl.dot(p, both, input_precision=DOT, out_dtype=ACC)
            tl.store(parts + part * C + j, 0.5 * tl.sum(product * q, axis=1), mask=there)
            if tangent is not None:
                turn = load_tile(tangent, j, A, right, there, right < A, ACC)
                turn -= tl.load(tangent + c * A + right, mask=right < A, other=0.0).to(ACC)[None, :]
                form = tl.sum(product * turn, axis=1)
                turn = load_tile(tangent, j, A, left, there, left < A, ACC)
                turn -= tl.load(tangent + c * A + left, mask=left < A, other=0.0).to(ACC)[None, :]
                product = tl.dot(turn, both, input_precision=DOT, out_dtype=ACC)
                form += tl.sum(product * q, axis=1)
                tl.store(tangent_parts + part * C + j, 0.5 * form, mask=there)


@triton.jit
def add_parts_kernel(parts, table, size, C, P, BLOCK: tl.constexpr, ACC: tl.constexpr):
    c = tl.program_id(0).to(tl.int64)
    if tl.load(size + c) == 0:
        return
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=ACC)
    for p in range(P):
        total += tl.load(parts + (c * P + p) * C + j, mask=j < C, other=0.0)
    tl.store(table + c * C + j, total, mask=j < C)


def stream_and_table(
    covariance: Tensor,
    weight: Tensor | None,
    groups: Groups,
    features: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
    tangent: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The streaming update if `moments` (center, shift) are given; R and Ṙ (C, C) if `weight` is.

    Rows of R for classes without samples are not written. One launch, two if Σ has several tiles,
    three with Ṙ.
    """
    center, shift = moments or (None, None)
    num_classes, width = covariance.shape[:2]
    tile = current_configuration(covariance.device).class_pass
    tiles = triton.cdiv(width, tile.rows)
    count = tiles * (tiles + 1) // 2
    parts = tangent_parts = None
    if weight is not None:
        parts = covariance.new_empty(num_classes, count, num_classes)
        tangent_parts = None if tangent is None else torch.empty_like(parts)
    _launch(
        tile, covariance, weight, tangent, groups, parts, tangent_parts,
        features, center, shift, None, None, 0.0, count,
        kind=NONE if moments is None else STREAM,
    )  # fmt: skip
    return _added(parts, groups), _added(tangent_parts, groups)


def add_pair_terms(
    covariance: Tensor,
    weight: Tensor,
    groups: Groups,
    curvature: Tensor,
    tangent: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    fresh: bool = False,
) -> None:
    """UPDATE = META on `covariance`, or FRESH. One launch."""
    tile = current_configuration(covariance.device).pair_terms
    _launch(
        tile, covariance, weight, tangent, groups, None, None,
        None, None, None, residual, curvature, scale, 0,
        kind=FRESH if fresh else META,
    )  # fmt: skip


def _launch(
    tile: Tile,
    covariance: Tensor,
    weight: Tensor | None,
    tangent: Tensor | None,
    groups: Groups,
    parts: Tensor | None,
    tangent_parts: Tensor | None,
    features: Tensor | None,
    center: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    curvature: Tensor | None,
    scale: float,
    count: int,
    kind: int,
) -> None:
    num_classes, width = covariance.shape[:2]
    launch(
        class_pass_kernel,
        (triton.cdiv(width, tile.rows) ** 2, num_classes),
        covariance, weight, tangent, groups.size, parts, tangent_parts,
        features, 0 if features is None else features.stride(0),
        groups.order, groups.start, groups.share, center, shift,
        residual, curvature, *split(scale),
        num_classes, width, count,
        warps=tile.warps, stages=tile.stages,
        UPDATE=kind, TABLE=parts is not None,
        BLOCK_A=tile.rows, BLOCK_J=tile.columns, BLOCK_K=tile.depth,
        ACC=compute_type(covariance.dtype),
        DOT=dot_precision(current_configuration(covariance.device)),
    )  # fmt: skip


def _added(parts: Tensor | None, groups: Groups) -> Tensor | None:
    """The parts of each class added up; a single part is the table."""
    if parts is None:
        return None
    num_classes, count, _ = parts.shape
    if count == 1:
        return parts[:, 0]
    table = parts.new_empty(num_classes, num_classes)
    block = min(1024, triton.next_power_of_2(num_classes))
    launch(
        add_parts_kernel,
        (num_classes, triton.cdiv(num_classes, block)),
        parts, table, groups.size, num_classes, count,
        BLOCK=block, ACC=compute_type(parts.dtype),
    )  # fmt: skip
    return table
