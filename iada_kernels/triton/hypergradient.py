"""The hypergradient of the head (Eq. 8 and 9) by Triton kernels.

With z̃, s and R as in the loss, and Ṙ the derivative of R along V,

    tangent   ż̃ = (h + ε s) Vᵀ + ḣ Wᵀ + v_b + α Ṙ[y]                         (N, C)
    residual  D = softmax(z̃) − onehot(y),  c = q ∘ (ż̃ − Σ_k q_k ż̃_k)         over z̃ and ż̃
    epsilon   ∂L̇/∂ε_i = g_i s_i · (D_i V + c_i W)                            (N)
    sums      Σ over the samples of each class of g D and g c, times α       (C, C) each

and `covariance_step` adds scale · ∂L̇/∂Σ: for a full Σ by the class pass; for a diagonal one row by
row, ∂L̇/∂σ_u = α Σ_{i: y_i = u} g_i Σ_j [ D_ij (w_j − w_u)(V_j − V_u) + ½ c_ij (w_j − w_u)² ].
g is 0 for rows that do not count and else 1, or 1/n for the mean.

Launches for a full Σ: rows of each class, first logits, sign, class pass (3 with its sums), logits,
tangent, residual, reduce, epsilon, class sums (2), and one for the step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.layout import contiguous_as, unit_inner_stride
from iada_kernels.triton.class_pass import rank_c_update, stream_and_table
from iada_kernels.triton.class_pass_backward import class_sums
from iada_kernels.triton.device import load_labels, load_tile, number, store_tile, tile_axis
from iada_kernels.triton.head import adjusted_logits, reduce_losses
from iada_kernels.triton.launch import (
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    split,
)
from iada_kernels.triton.rows import Groups, group_rows


class Sums(NamedTuple):
    """What ∂L̇/∂Σ is made of: α g D and α g c by class (C, C); D and c (N, C) for a diagonal Σ."""

    residual: Tensor
    curvature: Tensor
    row_scale: Tensor | None
    alpha: float
    groups: Groups


@triton.jit
def tangent_kernel(
    features, stride, weight, tangent, bias_tangent, feature_tangent, labels, sign, epsilon,
    variances, weight_mean, tangent_mean, table_tangent, table_stride, alpha, alpha_low, out,
    N, C, A, ignore_index,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows, row_mask = tile_axis(0, BLOCK_N, N)
    offs_c, col_mask = tile_axis(1, BLOCK_C, C)
    y, _ = load_labels(labels, rows, row_mask, ignore_index, C)
    label = tl.maximum(y, 0)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
    if sign is not None:
        eps = tl.load(epsilon + rows, mask=row_mask, other=0.0)
    if variances is not None:
        form = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
        constant = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        offs_a = first + tl.arange(0, BLOCK_A)
        k_mask = offs_a < A
        x = load_tile(features, rows, stride, offs_a, row_mask, k_mask, ACC)
        if sign is not None:
            x += eps[:, None] * load_tile(sign, rows, A, offs_a, row_mask, k_mask, ACC)
        v = load_tile(tangent, offs_c, A, offs_a, col_mask, k_mask, ACC)
        w = load_tile(weight, offs_c, A, offs_a, col_mask, k_mask, ACC)
        total = tl.dot(x, tl.trans(v), total, input_precision=DOT, out_dtype=ACC)
        if feature_tangent is not None:
            x = load_tile(feature_tangent, rows, A, offs_a, row_mask, k_mask, ACC)
            total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
        if variances is not None:
            mean_w = tl.load(weight_mean + offs_a, mask=k_mask, other=0.0)[None, :]
            mean_v = tl.load(tangent_mean + offs_a, mask=k_mask, other=0.0)[None, :]
            sigma = load_tile(variances, label, A, offs_a, row_mask, k_mask, ACC)
            w_label = load_tile(weight, label, A, offs_a, row_mask, k_mask, ACC) - mean_w
            v_label = load_tile(tangent, label, A, offs_a, row_mask, k_mask, ACC) - mean_v
            w = tl.where(col_mask[:, None], w - mean_w, 0.0)
            v = tl.where(col_mask[:, None], v - mean_v, 0.0)
            form = tl.dot(sigma, tl.trans(w * v), form, input_precision=DOT, out_dtype=ACC)
            form = tl.dot(-sigma * v_label, tl.trans(w), form, input_precision=DOT, out_dtype=ACC)
            form = tl.dot(-sigma * w_label, tl.trans(v), form, input_precision=DOT, out_dtype=ACC)
            constant += tl.sum(sigma * w_label * v_label, axis=1)
    if bias_tangent is not None:
        total += tl.load(bias_tangent + offs_c, mask=col_mask, other=0.0)[None, :]
    if variances is not None:
        form = tl.where(offs_c[None, :] == y[:, None], 0.0, form + constant[:, None])
        total += number(alpha, alpha_low, ACC) * form
    if table_tangent is not None:
        form = load_tile(
            table_tangent, label, table_stride, offs_c, row_mask & (y >= 0), col_mask, ACC
        )
        total += number(alpha, alpha_low, ACC) * form
    store_tile(out, rows, C, offs_c, row_mask, col_mask, total)


@triton.jit
def curvature_kernel(
    residual, tangent, labels, N, C, ignore_index,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place: `residual` holds D already and `tangent` becomes c."""
    rows, row_mask = tile_axis(0, BLOCK_N, N)
    y, _ = load_labels(labels, rows, row_mask, ignore_index, C)
    label_at = rows.to(tl.int64) * C + tl.maximum(y, 0)
    has_label = row_mask & (y >= 0)
    label_tangent = tl.load(tangent + label_at, mask=has_label, other=0.0)
    label_q = 1.0 + tl.load(residual + label_at, mask=has_label, other=0.0)
    # Relative to the label's class c keeps the digits that 1 − q_y loses.
    mean = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        other_mask = has_label[:, None] & (offs_c[None, :] != y[:, None])
        q = tl.where(
            other_mask, load_tile(residual, rows, C, offs_c, row_mask, offs_c < C, ACC), 0.0
        )
        logit_shift = (
            load_tile(tangent, rows, C, offs_c, row_mask, offs_c < C, ACC) - label_tangent[:, None]
        )
        mean += tl.sum(q * logit_shift, axis=1)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        other_mask = has_label[:, None] & (offs_c[None, :] != y[:, None])
        q = tl.where(
            other_mask, load_tile(residual, rows, C, offs_c, row_mask, offs_c < C, ACC), 0.0
        )
        logit_shift = (
            load_tile(tangent, rows, C, offs_c, row_mask, offs_c < C, ACC) - label_tangent[:, None]
        )
        ptrs = tangent + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask = row_mask[:, None] & (offs_c < C)[None, :] & (offs_c[None, :] != y[:, None])
        tl.store(ptrs, q * (logit_shift - mean[:, None]), mask=mask)
    tl.store(tangent + label_at, -label_q * mean, mask=has_label)


@triton.jit
def grad_epsilon_kernel(
    residual, curvature, weight, tangent, sign, scale, grad, N, C, A,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
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
    residual, curvature, row_scale, order, start, size, weight, tangent, covariance,
    scale, scale_low, C, A,
    BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    m = tl.load(size + c)
    if m == 0:
        return
    offs_a, col_mask = tile_axis(1, BLOCK_A, A)
    w_label = tl.load(weight + c * A + offs_a, mask=col_mask, other=0.0)[None, :]
    v_label = tl.load(tangent + c * A + offs_a, mask=col_mask, other=0.0)[None, :]
    total = tl.zeros([BLOCK_A], dtype=ACC)
    first = tl.load(start + c)
    for k in range(m):
        row = tl.load(order + first + k).to(tl.int64)
        for begin in range(0, C, BLOCK_J):
            offs_c = begin + tl.arange(0, BLOCK_J)
            d = tl.load(residual + row * C + offs_c, mask=offs_c < C, other=0.0)
            g = tl.load(curvature + row * C + offs_c, mask=offs_c < C, other=0.0)
            delta = load_tile(weight, offs_c, A, offs_a, offs_c < C, col_mask, ACC) - w_label
            dV = load_tile(tangent, offs_c, A, offs_a, offs_c < C, col_mask, ACC) - v_label
            total += tl.sum((d[:, None] * dV + 0.5 * g[:, None] * delta) * delta, axis=0)
    total *= number(scale, scale_low, ACC) * tl.load(row_scale)
    ptrs = covariance + c * A + offs_a
    old = tl.load(ptrs, mask=col_mask, other=0.0)
    tl.store(ptrs, (old.to(ACC) + total).to(covariance.dtype.element_ty), mask=col_mask)


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, Sums | None]:
    """∂L̇/∂ε (N), None without epsilon, and what `covariance_step` needs."""
    dtype = inputs.compute_dtype
    weight, tangent = inputs.weight.to(dtype).contiguous(), tangents.weight.to(dtype).contiguous()
    labels, sigma = inputs.labels.contiguous(), inputs.covariance
    full = sigma is not None and sigma.dim() == 3
    needs_covariance = needs_covariance and sigma is not None
    groups = table = table_tangent = None
    if full or needs_covariance:
        groups = group_rows(labels, len(weight), options.ignore_index, None, dtype)
    if full and groups is not None and sigma is not None:
        table, table_tangent = stream_and_table(
            sigma.to(dtype).contiguous(), weight, groups, tangent=tangent
        )
    z, sign = adjusted_logits(inputs, options, weight, table)
    z_tangent = torch.empty_like(z)
    _tangent_logits(z_tangent, inputs, options, tangents, weight, tangent, sign, table_tangent)
    _, inv_count = reduce_losses(z, labels, options)
    assert inv_count is not None
    configuration = current_configuration(weight.device)
    tile, (count, num_classes) = configuration.softmax, z.shape
    launch(
        curvature_kernel,
        (triton.cdiv(count, tile.rows),),
        z, z_tangent, labels, count, num_classes, options.ignore_index,
        warps=tile.warps, stages=tile.stages,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, ACC=compute_type(dtype),
    )  # fmt: skip
    grad_epsilon = None
    if sign is not None:
        tile = configuration.grad_features
        tiles = triton.cdiv(weight.shape[1], tile.columns)
        partials = weight.new_empty(tiles, count)
        launch(
            grad_epsilon_kernel,
            (triton.cdiv(count, tile.rows), tiles),
            z, z_tangent, weight, tangent, sign, inv_count, partials, count, *weight.shape,
            warps=tile.warps, stages=tile.stages,
            BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
            ACC=compute_type(dtype), DOT=dot_precision(configuration),
        )  # fmt: skip
        grad_epsilon = partials[0] if tiles == 1 else partials.sum(dim=0)
    if not needs_covariance or groups is None:
        return grad_epsilon, None
    if not full:
        return grad_epsilon, Sums(z, z_tangent, inv_count, options.alpha, groups)
    residual, curvature = (
        class_sums(rows, labels, inv_count, options.alpha, options.ignore_index)
        for rows in (z, z_tangent)
    )
    return grad_epsilon, Sums(residual, curvature, None, options.alpha, groups)


def covariance_step(
    covariance: Tensor, weight: Tensor, weight_tangent: Tensor, sums: Sums, scale: float
) -> None:
    """Σ += scale · ∂L̇/∂Σ in place, for covariance (C, A, A) or (C, A). One launch."""
    dtype = sums.residual.dtype
    weight, tangent = weight.to(dtype).contiguous(), weight_tangent.to(dtype).contiguous()
    in_place = covariance.is_contiguous() and covariance.dtype == dtype
    written = covariance if in_place else covariance.to(dtype).contiguous()
    if sums.row_scale is None:
        rank_c_update(written, weight, sums.groups, sums.curvature, tangent, sums.residual, scale)
    else:
        tile = current_configuration(weight.device).statistics
        groups, (num_classes, width) = sums.groups, weight.shape
        launch(
            variances_step_kernel,
            (num_classes, triton.cdiv(width, tile.columns)),
            sums.residual, sums.curvature, sums.row_scale,
            groups.order, groups.start, groups.size, weight, tangent, written,
            *split(scale * sums.alpha), num_classes, width,
            warps=tile.warps, stages=tile.stages,
            BLOCK_J=tile.rows, BLOCK_A=tile.columns, ACC=compute_type(dtype),
        )  # fmt: skip
    if not in_place:
        covariance.copy_(written)
    torch.autograd.graph.increment_version((covariance,))


def _tangent_logits(
    out: Tensor,
    inputs: LossInputs,
    options: LossOptions,
    tangents: HeadTangents,
    weight: Tensor,
    tangent: Tensor,
    sign: Tensor | None,
    table_tangent: Tensor | None,
) -> None:
    configuration = current_configuration(weight.device)
    tile, dtype = configuration.tangent, weight.dtype
    variances = weight_mean = tangent_mean = None
    if inputs.covariance is not None and inputs.covariance.dim() == 2:
        tile = configuration.diagonal_tangent
        variances = contiguous_as(inputs.covariance, dtype)
        weight_mean, tangent_mean = weight.mean(dim=0), tangent.mean(dim=0)
    features = unit_inner_stride(inputs.features)
    launch(
        tangent_kernel,
        (triton.cdiv(len(out), tile.rows), triton.cdiv(len(weight), tile.columns)),
        features, features.stride(0), weight, tangent, contiguous_as(tangents.bias, dtype),
        contiguous_as(tangents.features, dtype), inputs.labels.contiguous(), sign,
        None if sign is None else contiguous_as(inputs.epsilon, dtype),
        variances, weight_mean, tangent_mean,
        table_tangent, 0 if table_tangent is None else table_tangent.stride(0),
        *split(options.alpha), out, len(out), *weight.shape, options.ignore_index,
        warps=tile.warps, stages=tile.stages,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth,
        ACC=compute_type(dtype), DOT=dot_precision(configuration),
    )  # fmt: skip
