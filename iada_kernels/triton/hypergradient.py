"""The hypergradient of the head (Eq. 8 and 9) by Triton kernels.

With z̃, s and R as in the loss, and Ṙ the derivative of R along V,

    tangent   ż̃ = (h + ε s) Vᵀ + ḣ Wᵀ + v_b + α Ṙ[y]                         (N, C)
    residual  D = softmax(z̃) − onehot(y),  c = q ∘ (ż̃ − Σ_k q_k ż̃_k)         over z̃ and ż̃
    epsilon   ∂L̇/∂ε_i = g_i s_i · (D_i V + c_i W)                            (N)
    sums      Σ over the samples of each class of g D and g c, times α       (C, C) each

and `covariance_step` adds scale · ∂L̇/∂Σ: for a full Σ by the class pass; for a diagonal one row by
row, ∂L̇/∂σ_u = α Σ_{i: y_i = u} g_i Σ_j [ D_ij (w_j − w_u)(V_j − V_u) + ½ c_ij (w_j − w_u)² ].
g is 0 for rows that do not count and else 1, or 1/n for the mean.

Launches for a full Σ: the four of `forward`, tangent, curvature, epsilon, class sums (2), and one
for the step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.layout import contiguous_as
from iada_kernels.triton.class_pass import HeadWeight, rank_c_update
from iada_kernels.triton.class_pass_backward import class_sums
from iada_kernels.triton.config import cdiv
from iada_kernels.triton.device import (
    load_epsilon,
    load_samples,
    load_table,
    load_tile,
    number,
    samples_at,
    store_tile,
    tile_axis,
)
from iada_kernels.triton.forward import forward
from iada_kernels.triton.launch import current_configuration, launch, planned, split
from iada_kernels.triton.records import Diagonal, Labels, Samples, Sizes, Table
from iada_kernels.triton.rows import Groups


class Sums(NamedTuple):
    """What ∂L̇/∂Σ is made of: α g D and α g c by class (C, C); D and c (N, C) for a diagonal Σ."""

    residual: Tensor
    curvature: Tensor
    row_scale: Tensor | None
    alpha: float
    groups: Groups


class Tangents(NamedTuple):
    """`HeadTangents` as the kernel reads them, Ṙ of a full Σ among them."""

    features: Tensor | None  # ḣ (N, A)
    weight: Tensor  # V (C, A)
    bias: Tensor | None  # v_b (C)
    table: Table | None  # Ṙ (C, C)


@triton.jit
def tangent_kernel(
    samples, labels, weight, tangents, diagonal, alpha, out, sizes,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask, y, _ = samples_at(labels, tl.program_id(0), BLOCK_N, N, C)
    label = tl.maximum(y, 0)
    offs_c, col_mask = tile_axis(1, BLOCK_C, C)
    eps = load_epsilon(samples, rows, row_mask, ACC)
    tangent = tangents.weight
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
    if diagonal is not None:
        form = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
        constant = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        offs_a = first + tl.arange(0, BLOCK_A)
        k_mask = offs_a < A
        x = load_samples(samples, eps, rows, offs_a, row_mask, k_mask, A, ACC)
        v = load_tile(tangent, offs_c, A, offs_a, col_mask, k_mask, ACC)
        w = load_tile(weight, offs_c, A, offs_a, col_mask, k_mask, ACC)
        total = tl.dot(x, tl.trans(v), total, input_precision=DOT, out_dtype=ACC)
        if tangents.features is not None:
            x = load_tile(tangents.features, rows, A, offs_a, row_mask, k_mask, ACC)
            total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
        if diagonal is not None:
            mean_w = tl.load(diagonal.weight_mean + offs_a, mask=k_mask, other=0.0)[None, :]
            mean_v = tl.load(diagonal.tangent_mean + offs_a, mask=k_mask, other=0.0)[None, :]
            sigma = load_tile(diagonal.variances, label, A, offs_a, row_mask, k_mask, ACC)
            w_label = load_tile(weight, label, A, offs_a, row_mask, k_mask, ACC) - mean_w
            v_label = load_tile(tangent, label, A, offs_a, row_mask, k_mask, ACC) - mean_v
            w = tl.where(col_mask[:, None], w - mean_w, 0.0)
            v = tl.where(col_mask[:, None], v - mean_v, 0.0)
            form = tl.dot(sigma, tl.trans(w * v), form, input_precision=DOT, out_dtype=ACC)
            form = tl.dot(-sigma * v_label, tl.trans(w), form, input_precision=DOT, out_dtype=ACC)
            form = tl.dot(-sigma * w_label, tl.trans(v), form, input_precision=DOT, out_dtype=ACC)
            constant += tl.sum(sigma * w_label * v_label, axis=1)
    if tangents.bias is not None:
        total += tl.load(tangents.bias + offs_c, mask=col_mask, other=0.0)[None, :]
    if diagonal is not None:
        form = tl.where(offs_c[None, :] == y[:, None], 0.0, form + constant[:, None])
        total += number(alpha, ACC) * form
    if tangents.table is not None:
        form = load_table(tangents.table, y, offs_c, row_mask, col_mask, ACC)
        total += number(alpha, ACC) * form
    store_tile(out, rows, C, offs_c, row_mask, col_mask, total)


@triton.jit
def _load_shifted(
    residual, tangent, rows, offs_c, row_mask, y, label_tangent, C, ACC: tl.constexpr
):  # fmt: skip
    """q_j and ż̃_j − ż̃_y of a tile; q is 0 at the label and where a row does not count."""
    counts = (row_mask & (y >= 0))[:, None] & (offs_c[None, :] != y[:, None])
    q = load_tile(residual, rows, C, offs_c, row_mask, offs_c < C, ACC)
    shift = load_tile(tangent, rows, C, offs_c, row_mask, offs_c < C, ACC)
    return tl.where(counts, q, 0.0), shift - label_tangent[:, None]


@triton.jit
def curvature_kernel(
    residual, tangent, labels, N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place: `residual` holds D already and `tangent` becomes c."""
    rows, row_mask, y, _ = samples_at(labels, tl.program_id(0), BLOCK_N, N, C)
    label_at = rows.to(tl.int64) * C + tl.maximum(y, 0)
    has_label = row_mask & (y >= 0)
    label_tangent = tl.load(tangent + label_at, mask=has_label, other=0.0)
    label_q = 1.0 + tl.load(residual + label_at, mask=has_label, other=0.0)
    # Relative to the label's class c keeps the digits that 1 − q_y loses.
    mean = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        q, shift = _load_shifted(
            residual, tangent, rows, offs_c, row_mask, y, label_tangent, C, ACC
        )
        mean += tl.sum(q * shift, axis=1)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        q, shift = _load_shifted(
            residual, tangent, rows, offs_c, row_mask, y, label_tangent, C, ACC
        )
        ptrs = tangent + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask = row_mask[:, None] & (offs_c < C)[None, :] & (offs_c[None, :] != y[:, None])
        tl.store(ptrs, q * (shift - mean[:, None]), mask=mask)
    tl.store(tangent + label_at, -label_q * mean, mask=has_label)


@triton.jit
def grad_epsilon_kernel(
    residual, curvature, weight, tangent, sign, scale, grad, sizes,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask = tile_axis(0, BLOCK_N, N)
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    total = tl.zeros([BLOCK_N, BLOCK_A], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        d = load_tile(residual, rows, C, offs_c, row_mask, offs_c < C, ACC)
        v = load_tile(tangent, offs_c, A, offs_a, offs_c < C, col_mask, ACC)
        total = tl.dot(d, v, total, input_precision=DOT, out_dtype=ACC)
        d = load_tile(curvature, rows, C, offs_c, row_mask, offs_c < C, ACC)
        w = load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    s = load_tile(sign, rows, A, offs_a, row_mask, col_mask, ACC)
    partial = tl.sum(total * s, axis=1) * tl.load(scale)
    tl.store(grad + tl.program_id(1).to(tl.int64) * N + rows, partial, mask=row_mask)


@triton.jit
def variances_step_kernel(
    residual, curvature, row_scale, groups, weight, tangent, covariance, scale, C, A,
    BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    m = tl.load(groups.size + c)
    if m == 0:
        return
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    w_label = tl.load(weight + c * A + offs_a, mask=col_mask, other=0.0)[None, :]
    v_label = tl.load(tangent + c * A + offs_a, mask=col_mask, other=0.0)[None, :]
    total = tl.zeros([BLOCK_A], dtype=ACC)
    first = tl.load(groups.start + c)
    for k in range(m):
        row = tl.load(groups.order + first + k).to(tl.int64)
        for begin in range(0, C, BLOCK_J):
            offs_c = begin + tl.arange(0, BLOCK_J)
            d = tl.load(residual + row * C + offs_c, mask=offs_c < C, other=0.0)
            g = tl.load(curvature + row * C + offs_c, mask=offs_c < C, other=0.0)
            delta = load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC) - w_label
            dV = load_tile(tangent, offs_c, A, offs_a, offs_c < C, col_mask, ACC) - v_label
            total += tl.sum((d[:, None] * dV + 0.5 * g[:, None] * delta) * delta, axis=0)
    total *= number(scale, ACC) * tl.load(row_scale)
    ptrs = covariance + c * A + offs_a
    old = tl.load(ptrs, mask=col_mask, other=0.0)
    tl.store(ptrs, (old.to(ACC) + total).to(covariance.dtype.element_ty), mask=col_mask)


@planned
def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, Sums | None]:
    """∂L̇/∂ε (N), None without epsilon, and what `covariance_step` needs."""
    dtype, sigma = inputs.compute_dtype, inputs.covariance
    weight, tangent = contiguous_as(inputs.weight, dtype), contiguous_as(tangents.weight, dtype)
    labels, sizes = Labels.of(inputs, options), Sizes.of(inputs)
    needs_covariance = needs_covariance and sigma is not None
    residual, sign, _, inv_count, groups, table_tangent = forward(
        inputs, options, needs_covariance, tangent=tangent
    )
    assert inv_count is not None
    moves = Tangents(
        contiguous_as(tangents.features, dtype),
        tangent,
        contiguous_as(tangents.bias, dtype),
        Table.of(table_tangent),
    )
    z_tangent = _tangent_logits(inputs, options, weight, moves, sign)
    configuration = current_configuration(weight.device)
    tile = configuration.softmax
    launch(
        curvature_kernel, (cdiv(sizes.N, tile.rows),),
        residual, z_tangent, labels, sizes.N, sizes.C,
        like=weight, tile=tile, BLOCK_N=tile.rows, BLOCK_C=tile.columns,
    )  # fmt: skip
    grad_epsilon = None
    if sign is not None:
        tile = configuration.grad_features
        grid = tile.grid(sizes.N, sizes.A)
        partials = weight.new_empty(grid[1], sizes.N)
        launch(
            grad_epsilon_kernel, grid,
            residual, z_tangent, weight, tangent, sign, inv_count, partials, sizes,
            like=weight, tile=tile, BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
        )  # fmt: skip
        grad_epsilon = partials[0] if len(partials) == 1 else partials.sum(dim=0)
    if not needs_covariance or groups is None:
        return grad_epsilon, None
    if not inputs.has_full_covariance:
        return grad_epsilon, Sums(residual, z_tangent, inv_count, options.alpha, groups)
    sums, curvature = (
        class_sums(rows, labels, inv_count, options.alpha) for rows in (residual, z_tangent)
    )
    return grad_epsilon, Sums(sums, curvature, None, options.alpha, groups)


@planned
def covariance_step(
    covariance: Tensor, weight: Tensor, weight_tangent: Tensor, sums: Sums, scale: float
) -> None:
    """Σ += scale · ∂L̇/∂Σ in place, for covariance (C, A, A) or (C, A). One launch."""
    dtype = sums.residual.dtype
    weight, tangent = contiguous_as(weight, dtype), contiguous_as(weight_tangent, dtype)
    written = contiguous_as(covariance, dtype)
    if sums.row_scale is None:
        head = HeadWeight(weight, tangent)
        rank_c_update(written, head, sums.groups, sums.curvature, sums.residual, scale)
    else:
        tile, (num_classes, width) = current_configuration(weight.device).statistics, weight.shape
        launch(
            variances_step_kernel, (num_classes, cdiv(width, tile.columns)),
            sums.residual, sums.curvature, sums.row_scale, sums.groups, weight, tangent, written,
            split(scale * sums.alpha), num_classes, width,
            like=weight, tile=tile, BLOCK_J=tile.rows, BLOCK_A=tile.columns,
        )  # fmt: skip
    if written is not covariance:
        covariance.copy_(written)
    torch.autograd.graph.increment_version((covariance,))


def _tangent_logits(
    inputs: LossInputs,
    options: LossOptions,
    weight: Tensor,
    tangents: Tangents,
    sign: Tensor | None,
) -> Tensor:
    """ż̃ (N, C)."""
    configuration, sizes = current_configuration(weight.device), Sizes.of(inputs)
    diagonal = Diagonal.of(inputs, weight, tangents.weight)
    tile = configuration.tangent if diagonal is None else configuration.diagonal_tangent
    out = weight.new_empty(sizes.N, sizes.C)
    launch(
        tangent_kernel, tile.grid(*out.shape),
        Samples.of(inputs, sign), Labels.of(inputs, options), weight, tangents, diagonal,
        split(options.alpha), out, sizes,
        like=weight, tile=tile, BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth,
    )  # fmt: skip
    return out
