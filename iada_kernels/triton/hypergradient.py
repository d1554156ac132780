"""The hypergradient of the head (Eq. 8 and 9) by Triton kernels.

With z̃, s and R as in the loss, and Ṙ the derivative of R along V,

    tangent   ż̃ = (h + ε s) Vᵀ + ḣ Wᵀ + v_b + α Ṙ[y]                         (N, C)
    residual  D = softmax(z̃) − onehot(y),  c = q ∘ (ż̃ − Σ_k q_k ż̃_k)         over z̃ and ż̃
    strength  ∂L̇/∂ε_i = g_i s_i · (D_i V + c_i W)                            (N)
    sums      Σ over the samples of each class of g D and g c, times α       (C, C) each

and `covariance_step` adds scale · ∂L̇/∂Σ: for a full Σ by the class pass; for a diagonal one row by
row, ∂L̇/∂σ_u = α Σ_{i: y_i = u} g_i Σ_j [ D_ij (w_j − w_u)(V_j − V_u) + ½ c_ij (w_j − w_u)² ].
g is 0 for rows that do not count and else 1, or 1/n for the mean.

Launches for a full Σ: rows of each class, first logits, sign, class pass (3 with its sums), logits,
tangent, residual, reduce, strength, class sums (2), and one for the step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.triton.class_pass import add_pair_terms, stream_and_table
from iada_kernels.triton.class_pass_backward import class_sums
from iada_kernels.triton.device import load_labels, load_tile, number
from iada_kernels.triton.head import adjusted_logits, reduce_losses
from iada_kernels.triton.launch import (
    by_rows,
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    plain,
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
    variances, offset, offset_tangent, table, table_stride, alpha, alpha_low, out, N, C, A,
    ignore_index,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there, inside = rows < N, j < C
    y, _ = load_labels(labels, rows, there, ignore_index, C)
    own = tl.maximum(y, 0)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
    if sign is not None:
        strength = tl.load(epsilon + rows, mask=there, other=0.0)
    if variances is not None:
        form = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
        constant = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        a = first + tl.arange(0, BLOCK_A)
        deep = a < A
        x = load_tile(features, rows, stride, a, there, deep, ACC)
        if sign is not None:
            x += strength[:, None] * load_tile(sign, rows, A, a, there, deep, ACC)
        v = load_tile(tangent, j, A, a, inside, deep, ACC)
        w = load_tile(weight, j, A, a, inside, deep, ACC)
        total = tl.dot(x, tl.trans(v), total, input_precision=DOT, out_dtype=ACC)
        if feature_tangent is not None:
            x = load_tile(feature_tangent, rows, A, a, there, deep, ACC)
            total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
        if variances is not None:
            shared = tl.load(offset + a, mask=deep, other=0.0)[None, :]
            shared_v = tl.load(offset_tangent + a, mask=deep, other=0.0)[None, :]
            sigma = load_tile(variances, own, A, a, there, deep, ACC)
            w_own = load_tile(weight, own, A, a, there, deep, ACC) - shared
            v_own = load_tile(tangent, own, A, a, there, deep, ACC) - shared_v
            w = tl.where(inside[:, None], w - shared, 0.0)
            v = tl.where(inside[:, None], v - shared_v, 0.0)
            form = tl.dot(sigma, tl.trans(w * v), form, input_precision=DOT, out_dtype=ACC)
            form = tl.dot(-sigma * v_own, tl.trans(w), form, input_precision=DOT, out_dtype=ACC)
            form = tl.dot(-sigma * w_own, tl.trans(v), form, input_precision=DOT, out_dtype=ACC)
            constant += tl.sum(sigma * w_own * v_own, axis=1)
    if bias_tangent is not None:
        total += tl.load(bias_tangent + j, mask=inside, other=0.0)[None, :]
    if variances is not None:
        form = tl.where(j[None, :] == y[:, None], 0.0, form + constant[:, None])
        total += number(alpha, alpha_low, ACC) * form
    if table is not None:
        turned = load_tile(table, own, table_stride, j, there & (y >= 0), inside, ACC)
        total += number(alpha, alpha_low, ACC) * turned
    place = out + rows.to(tl.int64)[:, None] * C + j[None, :]
    tl.store(place, total, mask=there[:, None] & inside[None, :])


@triton.jit
def curvature_kernel(
    residual, tangent, labels, N, C, ignore_index,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place: `residual` holds D already and `tangent` becomes c."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < N
    y, _ = load_labels(labels, rows, there, ignore_index, C)
    own = rows.to(tl.int64) * C + tl.maximum(y, 0)
    counts = there & (y >= 0)
    own_tangent = tl.load(tangent + own, mask=counts, other=0.0)
    own_q = 1.0 + tl.load(residual + own, mask=counts, other=0.0)
    # Relative to the own class c keeps the digits that 1 − q_y loses.
    mean = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        others = counts[:, None] & (j[None, :] != y[:, None])
        q = tl.where(others, load_tile(residual, rows, C, j, there, j < C, ACC), 0.0)
        turn = load_tile(tangent, rows, C, j, there, j < C, ACC) - own_tangent[:, None]
        mean += tl.sum(q * turn, axis=1)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        others = counts[:, None] & (j[None, :] != y[:, None])
        q = tl.where(others, load_tile(residual, rows, C, j, there, j < C, ACC), 0.0)
        turn = load_tile(tangent, rows, C, j, there, j < C, ACC) - own_tangent[:, None]
        place = tangent + rows.to(tl.int64)[:, None] * C + j[None, :]
        mask = there[:, None] & (j < C)[None, :] & (j[None, :] != y[:, None])
        tl.store(place, q * (turn - mean[:, None]), mask=mask)
    tl.store(tangent + own, -own_q * mean, mask=counts)


@triton.jit
def strength_kernel(
    residual, curvature, weight, tangent, sign, scale, grad, N, C, A,
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
        v = load_tile(tangent, j, A, a, j < C, inside, ACC)
        total = tl.dot(d, v, total, input_precision=DOT, out_dtype=ACC)
        d = load_tile(curvature, rows, C, j, there, j < C, ACC)
        w = load_tile(weight, j, A, a, j < C, inside, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    s = load_tile(sign, rows, A, a, there, inside, ACC)
    part = tl.sum(total * s, axis=1) * tl.load(scale)
    tl.store(grad + tl.program_id(1).to(tl.int64) * N + rows, part, mask=there)


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
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = a < A
    w_own = tl.load(weight + c * A + a, mask=inside, other=0.0)[None, :]
    v_own = tl.load(tangent + c * A + a, mask=inside, other=0.0)[None, :]
    total = tl.zeros([BLOCK_A], dtype=ACC)
    first = tl.load(start + c)
    for k in range(m):
        row = tl.load(order + first + k).to(tl.int64)
        for begin in range(0, C, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            d = tl.load(residual + row * C + j, mask=j < C, other=0.0)
            g = tl.load(curvature + row * C + j, mask=j < C, other=0.0)
            delta = load_tile(weight, j, A, a, j < C, inside, ACC) - w_own
            turn = load_tile(tangent, j, A, a, j < C, inside, ACC) - v_own
            total += tl.sum((d[:, None] * turn + 0.5 * g[:, None] * delta) * delta, axis=0)
    total *= number(scale, scale_low, ACC) * tl.load(row_scale)
    place = covariance + c * A + a
    old = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (old.to(ACC) + total).to(covariance.dtype.element_ty), mask=inside)


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, Sums | None]:
    """∂L̇/∂ε (N), None without epsilon, and what `covariance_step` needs."""
    dtype = inputs.compute_dtype
    weight, tangent = inputs.weight.to(dtype).contiguous(), tangents.weight.to(dtype).contiguous()
    labels, sigma = inputs.labels.contiguous(), inputs.covariance
    full = sigma is not None and sigma.dim() == 3
    needs_covariance = needs_covariance and sigma is not None
    groups = table = turned = None
    if full or needs_covariance:
        groups = group_rows(labels, len(weight), options.ignore_index, None, dtype)
    if full and groups is not None and sigma is not None:
        table, turned = stream_and_table(
            sigma.to(dtype).contiguous(), weight, groups, tangent=tangent
        )
    z, sign = adjusted_logits(inputs, options, weight, table)
    z_tangent = torch.empty_like(z)
    _tangent_logits(z_tangent, inputs, options, tangents, weight, tangent, sign, turned)
    _, share = reduce_losses(z, labels, options)
    assert share is not None
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
        parts = weight.new_empty(tiles, count)
        launch(
            strength_kernel,
            (triton.cdiv(count, tile.rows), tiles),
            z, z_tangent, weight, tangent, sign, share, parts, count, *weight.shape,
            warps=tile.warps, stages=tile.stages,
            BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
            ACC=compute_type(dtype), DOT=dot_precision(configuration),
        )  # fmt: skip
        grad_epsilon = parts[0] if tiles == 1 else parts.sum(dim=0)
    if not needs_covariance or groups is None:
        return grad_epsilon, None
    if not full:
        return grad_epsilon, Sums(z, z_tangent, share, options.alpha, groups)
    residual, curvature = (
        class_sums(rows, labels, share, options.alpha, options.ignore_index)
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
    state = covariance if in_place else covariance.to(dtype).contiguous()
    if sums.row_scale is None:
        add_pair_terms(state, weight, sums.groups, sums.curvature, tangent, sums.residual, scale)
    else:
        tile = current_configuration(weight.device).statistics
        groups, (num_classes, width) = sums.groups, weight.shape
        launch(
            variances_step_kernel,
            (num_classes, triton.cdiv(width, tile.columns)),
            sums.residual, sums.curvature, sums.row_scale,
            groups.order, groups.start, groups.size, weight, tangent, state,
            *split(scale * sums.alpha), num_classes, width,
            warps=tile.warps, stages=tile.stages,
            BLOCK_J=tile.rows, BLOCK_A=tile.columns, ACC=compute_type(dtype),
        )  # fmt: skip
    if not in_place:
        covariance.copy_(state)
    torch.autograd.graph.increment_version((covariance,))


def _tangent_logits(
    out: Tensor,
    inputs: LossInputs,
    options: LossOptions,
    tangents: HeadTangents,
    weight: Tensor,
    tangent: Tensor,
    sign: Tensor | None,
    table: Tensor | None,
) -> None:
    configuration = current_configuration(weight.device)
    tile, dtype = configuration.tangent, weight.dtype
    variances = offset = offset_tangent = None
    if inputs.covariance is not None and inputs.covariance.dim() == 2:
        tile = configuration.diagonal_tangent
        variances = plain(inputs.covariance, dtype)
        offset, offset_tangent = weight.mean(dim=0), tangent.mean(dim=0)
    features = by_rows(inputs.features)
    launch(
        tangent_kernel,
        (triton.cdiv(len(out), tile.rows), triton.cdiv(len(weight), tile.columns)),
        features, features.stride(0), weight, tangent, plain(tangents.bias, dtype),
        plain(tangents.features, dtype), inputs.labels.contiguous(), sign,
        None if sign is None else plain(inputs.epsilon, dtype),
        variances, offset, offset_tangent, table, 0 if table is None else table.stride(0),
        *split(options.alpha), out, len(out), *weight.shape, options.ignore_index,
        warps=tile.warps, stages=tile.stages,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth,
        ACC=compute_type(dtype), DOT=dot_precision(configuration),
    )  # fmt: skip
