"""The loss of one class by one program, and its parts of the gradients: steps of `single_launch`.

Symbols and shapes are explained there.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import (
    load_epsilon,
    load_samples,
    load_tile,
    number,
    onto_features,
    wait_for_memory,
)
from iada_kernels.triton.launch import Number
from iada_kernels.triton.moments import class_mean
from iada_kernels.triton.plans import own


class Head(NamedTuple):
    """W, whose rows lie `stride` elements apart, and b."""

    weight: Tensor
    stride: int
    bias: Tensor | None


class Terms(NamedTuple):
    """α R by a full Σ, and β log π."""

    covariance: Tensor | None
    alpha: Number
    log_prior: Tensor | None
    beta: Number


class Statistics(NamedTuple):
    """`ClassStatistics`, updated in place."""

    mean: Tensor  # μ
    n: Tensor


class Scratch(NamedTuple):
    """What the threads and programs of one launch tell each other."""

    order: Tensor  # (N) int32, the rows class by class
    residual: Tensor | None  # (N, C), r and then D
    losses: Tensor  # (C)
    arrived: Tensor  # (1) int32, the programs that are done, 0 before


@own
class SavedParts(NamedTuple):
    """The rows of each class, size (C) int32, and in the compute dtype G and what is needed."""

    size: Tensor
    sums: Tensor
    features: Tensor | None
    weight: Tensor | None
    covariance: Tensor | None
    epsilon: Tensor | None


class Blocks(NamedTuple):
    """How much of each axis is held at once: constants of the kernel."""

    N: tl.constexpr  # labels
    M: tl.constexpr  # rows of the class
    J: tl.constexpr  # classes, in the product with Σ
    C: tl.constexpr  # all classes
    A: tl.constexpr  # all features
    STEP: tl.constexpr  # classes or features, in other products


@triton.jit
def _update_statistics(
    samples, order, m, covariance, statistics, c, A, B: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The streaming update of Σ_c, μ_c and n_c, in place."""
    offs_a = tl.arange(0, B.A)
    col_mask = offs_a < A
    center = class_mean(samples, order, m, offs_a, col_mask, B.M, B.A, ACC)
    scatter = tl.zeros([B.A, B.A], dtype=ACC)
    for k in range(0, m, B.M):
        at = k + tl.arange(0, B.M)
        rows = tl.load(order + at, mask=at < m, other=0)
        x = load_tile(samples.features, rows, samples.stride, offs_a, at < m, col_mask, ACC)
        x = tl.where((at < m)[:, None], x - center[None, :], 0.0)
        scatter = tl.dot(tl.trans(x), x, scatter, input_precision=DOT, out_dtype=ACC)
    scatter = 0.5 * (scatter + tl.trans(scatter))  # the two halves differ by rounding

    ptrs = covariance + c * A * A + offs_a[:, None] * A + offs_a[None, :]
    mask = col_mask[:, None] & col_mask[None, :]
    s = tl.load(ptrs, mask=mask, other=0.0)
    old = tl.load(statistics.mean + c * A + offs_a, mask=col_mask, other=0.0)
    n = tl.load(statistics.n + c)
    wait_for_memory()
    tl.debug_barrier()  # several threads may read what one of them writes now
    w = tl.cast(m, ACC) / tl.cast(n + m, ACC)
    shift = center - old
    between = shift[:, None] * shift[None, :]
    s = (1 - w) * s + ((w / m) * scatter + (w * (1 - w)) * between)
    tl.store(ptrs, s, mask=mask)
    tl.store(statistics.mean + c * A + offs_a, old + w * shift, mask=col_mask)
    tl.store(statistics.n + c, n + m)


@triton.jit
def _label_weight(label_row, columns, mask, ACC: tl.constexpr):
    """w_c, which lies at `label_row`."""
    return tl.load(label_row + columns, mask=mask, other=0.0).to(ACC)


@triton.jit
def _quadratic_forms(
    head, label_row, sigma, parts, c, sizes, B: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """R_c into the part of the sums, and P = Δ ½(Σ + Σᵀ), Δ = W − 1 w_cᵀ, into that of ∂W."""
    _, C, A = sizes
    offs_a = tl.arange(0, B.A)
    col_mask = offs_a < A
    for begin in range(0, C, B.J):
        i = begin + tl.arange(0, B.J)
        delta_sigma = tl.zeros([B.J, B.A], dtype=ACC)
        for first in range(0, A, 16):
            k = first + tl.arange(0, 16)
            k_mask = k < A
            mask = k_mask[:, None] & col_mask[None, :]
            both = tl.load(sigma + k[:, None] * A + offs_a[None, :], mask=mask, other=0.0)
            mirror_ptrs = sigma + offs_a[:, None] * A + k[None, :]
            mirror = tl.load(mirror_ptrs, mask=tl.trans(mask), other=0.0)
            both = 0.5 * (both + tl.trans(mirror))
            w = load_tile(head.weight, i, head.stride, k, i < C, k_mask, ACC)
            w -= _label_weight(label_row, k, k_mask, ACC)[None, :]
            delta_sigma = tl.dot(w, both, delta_sigma, input_precision=DOT, out_dtype=ACC)
        delta = load_tile(head.weight, i, head.stride, offs_a, i < C, col_mask, ACC)
        delta -= _label_weight(label_row, offs_a, col_mask, ACC)[None, :]
        form = 0.5 * tl.sum(delta_sigma * delta, axis=1)
        tl.store(parts.sums + c * C + i, form, mask=i < C)
        if parts.weight is not None:
            ptrs = parts.weight + c * C * A + i[:, None] * A + offs_a[None, :]
            tl.store(ptrs, delta_sigma, mask=(i < C)[:, None] & col_mask[None, :])


@triton.jit
def _onto_classes(
    base, stride, rows, row_mask, head, sizes, B: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """base[rows, :A] Wᵀ, (rows, C)."""
    _, C, A = sizes
    offs_c = tl.arange(0, B.C)
    total = tl.zeros([B.M, B.C], dtype=ACC)
    for first in range(0, A, B.STEP):
        offs_a = first + tl.arange(0, B.STEP)
        x = load_tile(base, rows, stride, offs_a, row_mask, offs_a < A, ACC)
        w = load_tile(head.weight, offs_c, head.stride, offs_a, offs_c < C, offs_a < A, ACC)
        total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
    return total


@triton.jit
def _sign_logits(
    z, samples, residual, row_residual, rows, row_mask, head, label_row, c, sizes,
    B: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """s is stored; T = s Wᵀ (rows, C) is returned.

    r passes through `residual`, of which `row_residual` are the pointers to these rows.
    """
    _, C, A = sizes
    offs_c, offs_a = tl.arange(0, B.C), tl.arange(0, B.A)
    class_mask, col_mask = offs_c < C, offs_a < A
    other_mask = class_mask & ((offs_c == c) == 0)
    row_max = tl.max(tl.where(other_mask[None, :], z, float("-inf")), axis=1)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    r = tl.where(other_mask[None, :], tl.exp(z - row_max[:, None]), 0.0)
    mass = tl.sum(r, axis=1)
    r /= tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(row_residual, r, mask=row_mask[:, None] & class_mask[None, :])
    wait_for_memory()
    tl.debug_barrier()
    g = onto_features(
        residual, rows, row_mask, head.weight, head.stride, offs_a, col_mask, C,
        B.M, B.A, B.STEP, ACC, DOT,
    )  # fmt: skip
    g -= _label_weight(label_row, offs_a, col_mask, ACC)[None, :]
    s = (g > 0).to(tl.int8) - (g < 0).to(tl.int8)
    if C == 1:
        s = tl.zeros([B.M, B.A], dtype=tl.int8)
    ptrs = samples.sign + rows[:, None] * A + offs_a[None, :]
    tl.store(ptrs, s, mask=row_mask[:, None] & col_mask[None, :])
    wait_for_memory()
    tl.debug_barrier()
    return _onto_classes(samples.sign, A, rows, row_mask, head, sizes, B, ACC, DOT)


@triton.jit
def _row_gradients(
    samples, residual, order, m, head, parts, sizes, B: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """∂h is stored; Dᵀ (h + ε s) (C, A) is returned, 0 where ∂W is not needed."""
    _, C, A = sizes
    offs_c, offs_a = tl.arange(0, B.C), tl.arange(0, B.A)
    class_mask, col_mask = offs_c < C, offs_a < A
    grad = tl.zeros([B.C, B.A], dtype=ACC)
    for start in range(0, m, B.M):
        at = start + tl.arange(0, B.M)
        row_mask = at < m
        rows = tl.load(order + at, mask=row_mask, other=0)
        if parts.features is not None:
            dh = onto_features(
                residual, rows, row_mask, head.weight, head.stride, offs_a, col_mask, C,
                B.M, B.A, B.STEP, ACC, DOT,
            )  # fmt: skip
            row_grad = parts.features + rows[:, None] * A + offs_a[None, :]
            tl.store(row_grad, dh, mask=row_mask[:, None] & col_mask[None, :])
        if parts.weight is not None:
            x = load_samples(samples, None, rows, offs_a, row_mask, col_mask, A, ACC)
            d = load_tile(residual, rows, C, offs_c, row_mask, class_mask, ACC)
            grad = tl.dot(tl.trans(d), x, grad, input_precision=DOT, out_dtype=ACC)
    return grad


@triton.jit
def _covariance_gradient(
    head, label_row, parts, c, alpha, sizes, B: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """½ α Σ_j G_j (w_j − w_c)(w_j − w_c)ᵀ is stored; G is the part of the sums."""
    _, C, A = sizes
    offs_a = tl.arange(0, B.A)
    col_mask = offs_a < A
    term = tl.zeros([B.A, B.A], dtype=ACC)
    label_weight = _label_weight(label_row, offs_a, col_mask, ACC)
    for first in range(0, C, B.STEP):
        i = first + tl.arange(0, B.STEP)
        g_i = tl.load(parts.sums + c * C + i, mask=i < C, other=0.0)
        difference = load_tile(head.weight, i, head.stride, offs_a, i < C, col_mask, ACC)
        difference -= label_weight[None, :]
        scaled = g_i[:, None] * difference
        term = tl.dot(tl.trans(difference), scaled, term, input_precision=DOT, out_dtype=ACC)
    term = (0.25 * alpha) * (term + tl.trans(term))
    ptrs = parts.covariance + c * A * A + offs_a[:, None] * A + offs_a[None, :]
    tl.store(ptrs, term, mask=col_mask[:, None] & col_mask[None, :])


@triton.jit
def class_loss(
    samples, order, m, head, terms, statistics, scratch, parts, c, inv_count, sizes,
    B: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sum of the losses of class c, which has m > 0 rows; its parts are stored.

    W and Σ are read again, in slices, wherever a product needs them, and r, s and D pass through
    memory: kept, they would not fit into registers.
    """
    _, C, A = sizes
    residual = scratch.residual
    alpha, beta = number(terms.alpha, ACC), number(terms.beta, ACC)
    offs_c, offs_a = tl.arange(0, B.C), tl.arange(0, B.A)
    class_mask, col_mask = offs_c < C, offs_a < A
    label_mask = offs_c == c
    # Pointers formed before they are needed: ptxas keeps 2 registers fewer.
    label_row = head.weight + c * head.stride
    class_sums = parts.sums + c * C + offs_c  # R, and in the end G
    if parts.weight is not None:
        class_weight = parts.weight + c * C * A

    offset = tl.zeros([B.C], dtype=ACC)  # z̃ − h Wᵀ − b − ε T
    if terms.covariance is not None:
        if statistics is not None:
            _update_statistics(samples, order, m, terms.covariance, statistics, c, A, B, ACC, DOT)
            wait_for_memory()
            tl.debug_barrier()  # Σ is read in another layout
        sigma = terms.covariance + c * A * A
        _quadratic_forms(head, label_row, sigma, parts, c, sizes, B, ACC, DOT)
        wait_for_memory()
        tl.debug_barrier()
        offset += alpha * tl.load(class_sums, mask=class_mask, other=0.0)
    if terms.log_prior is not None:
        prior = tl.load(terms.log_prior + offs_c, mask=class_mask, other=0.0).to(ACC)
        offset += beta * prior

    total = tl.zeros([B.M], dtype=ACC)
    sums = tl.zeros([B.C], dtype=ACC)
    for start in range(0, m, B.M):
        at = start + tl.arange(0, B.M)
        row_mask = at < m
        rows = tl.load(order + at, mask=row_mask, other=0)
        if residual is not None:  # formed once: ptxas keeps up to 12 registers fewer
            row_residual = residual + rows[:, None] * C + offs_c[None, :]
        z = _onto_classes(
            samples.features, samples.stride, rows, row_mask, head, sizes, B, ACC, DOT
        )  # fmt: skip
        if head.bias is not None:
            z += tl.load(head.bias + offs_c, mask=class_mask, other=0.0).to(ACC)[None, :]
        if samples.sign is not None:
            sign_logits = _sign_logits(
                z, samples, residual, row_residual, rows, row_mask, head, label_row, c, sizes,
                B, ACC, DOT,
            )  # fmt: skip
            eps = load_epsilon(samples, rows, row_mask, ACC)
            z += eps[:, None] * sign_logits
        z += offset[None, :]
        row_max = tl.max(tl.where(class_mask[None, :], z, float("-inf")), axis=1)
        d = tl.where(class_mask[None, :], tl.exp(z - row_max[:, None]), 0.0)
        mass = tl.sum(d, axis=1)
        z_label = tl.sum(tl.where(label_mask[None, :], z, 0.0), axis=1)
        total += tl.where(row_mask, tl.log(mass) + (row_max - z_label), 0.0)
        # D_y = −Σ_{j≠y} p_j keeps the digits that p_y − 1 loses on a confident sample.
        d = tl.where(label_mask[None, :], 0.0, d / mass[:, None])
        d = tl.where(label_mask[None, :], -tl.sum(d, axis=1)[:, None], d)
        d = tl.where(row_mask[:, None], d * inv_count, 0.0)
        sums += tl.sum(d, axis=0)
        if parts.epsilon is not None:
            tl.store(parts.epsilon + rows, tl.sum(d * sign_logits, axis=1), mask=row_mask)
        if residual is not None:
            tl.store(row_residual, d, mask=row_mask[:, None] & class_mask[None, :])

    if residual is not None:
        wait_for_memory()
        tl.debug_barrier()  # D, s and P are read in other layouts
        grad = _row_gradients(samples, residual, order, m, head, parts, sizes, B, ACC, DOT)
    if parts.weight is not None:
        mask = class_mask[:, None] & col_mask[None, :]
        weight_ptrs = class_weight + offs_c[:, None] * A + offs_a[None, :]
        if terms.covariance is not None:
            table_grad = tl.load(weight_ptrs, mask=mask, other=0.0) * (alpha * sums)[:, None]
            grad += table_grad - tl.where(
                label_mask[:, None], tl.sum(table_grad, axis=0)[None, :], 0.0
            )
            wait_for_memory()
            tl.debug_barrier()  # P has been read
        tl.store(weight_ptrs, grad, mask=mask)
    wait_for_memory()
    tl.debug_barrier()  # R has been read
    tl.store(class_sums, sums, mask=class_mask)
    if parts.covariance is not None:
        wait_for_memory()
        tl.debug_barrier()  # G is read in slices
        _covariance_gradient(head, label_row, parts, c, alpha, sizes, B, ACC, DOT)
    return tl.sum(total, axis=0)
