"""The single-launch loss, for heads so small that W and Σ_c fit in one program.

One program for each class c does everything for the rows i with y_i = c:

    rows    found by scanning the labels
    stream  Σ_c, μ_c, n_c ← the streaming update                                     (if asked)
    forms   P = (W − 1 w_cᵀ) ½(Σ_c + Σ_cᵀ),   R_j = ½ P_j · (w_j − w_c)
    rows    z = h Wᵀ + b,   s = sign(Σ_{j≠c} r_j w_j − w_c),   T = s Wᵀ
            z̃ = z + ε T + α R + β log π,   ℓ,   D = softmax(z̃) − onehot(c)
            ∂h = D W,   ∂ε = Σ_j D_j T_j,   G += D,   ∂W += Dᵀ (h + ε s)
    class   ∂W += α [G∘P − e_c Gᵀ P],   ∂Σ_c = ½ α Σ_j G_j (w_j − w_c)(w_j − w_c)ᵀ

Symbols and conventions as in `head`, `moments` and `class_pass`. Gradients are those of the reduced
loss; `single_launch_backward` adds the parts of the classes and multiplies by the gradient of the
loss. The program that finishes last adds the losses of the classes, in their order.

features (N, A) · weight (C, A) · covariance (C, A, A) · Parts, written for classes that have rows:
∂h (N, A) and ∂ε (N) at their rows, ∂W (C, C, A), G (C, C), ∂Σ (C, A, A).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import ClassStatistics, LossInputs, LossNeeds, LossOptions
from iada_kernels.layout import unit_inner_stride
from iada_kernels.triton.device import load_tile, number
from iada_kernels.triton.launch import (
    compute_type,
    current_configuration,
    dot_precision,
    launch,
    split,
)
from iada_kernels.triton.moments import class_mean
from iada_kernels.triton.rows import scan_rows


@triton.jit
def _stream(
    features, stride, order, m, covariance, mean, count, c, offs_a, A,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The streaming update of Σ_c, μ_c and n_c, in place."""
    col_mask = offs_a < A
    center = class_mean(features, stride, order, m, offs_a, col_mask, BLOCK_M, BLOCK_A, ACC)
    scatter = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_M):
        at = k + tl.arange(0, BLOCK_M)
        rows = tl.load(order + at, mask=at < m, other=0)
        x = load_tile(features, rows, stride, offs_a, at < m, col_mask, ACC)
        x = tl.where((at < m)[:, None], x - center[None, :], 0.0)
        scatter = tl.dot(tl.trans(x), x, scatter, input_precision=DOT, out_dtype=ACC)
    scatter = 0.5 * (scatter + tl.trans(scatter))  # the two halves differ by rounding

    ptrs = covariance + c * A * A + offs_a[:, None] * A + offs_a[None, :]
    mask = col_mask[:, None] & col_mask[None, :]
    s = tl.load(ptrs, mask=mask, other=0.0)
    old = tl.load(mean + c * A + offs_a, mask=col_mask, other=0.0)
    n = tl.load(count + c)
    tl.debug_barrier()  # several threads may read what one of them writes now
    w = tl.cast(m, ACC) / tl.cast(n + m, ACC)
    shift = center - old
    between = shift[:, None] * shift[None, :]
    s = (1 - w) * s + ((w / m) * scatter + (w * (1 - w)) * between)
    tl.store(ptrs, s, mask=mask)
    tl.store(mean + c * A + offs_a, old + w * shift, mask=col_mask)
    tl.store(count + c, n + m)


@triton.jit
def _delta_sigma(
    weight, weight_stride, label_weight, sigma, rows, row_mask, offs_a, col_mask, A,
    BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Δ = W − 1 w_cᵀ and P = Δ ½(Σ + Σᵀ) for some classes j, (BLOCK_J, A)."""
    delta_sigma = tl.zeros([BLOCK_J, BLOCK_A], dtype=ACC)
    for first in range(0, A, 16):
        k = first + tl.arange(0, 16)
        k_mask = k < A
        mask = k_mask[:, None] & col_mask[None, :]
        both = tl.load(sigma + k[:, None] * A + offs_a[None, :], mask=mask, other=0.0)
        mirror = tl.load(sigma + offs_a[:, None] * A + k[None, :], mask=tl.trans(mask), other=0.0)
        both = 0.5 * (both + tl.trans(mirror))
        w = load_tile(weight, rows, weight_stride, k, row_mask, k_mask, ACC)
        w -= tl.load(label_weight + k, mask=k_mask, other=0.0).to(ACC)[None, :]
        delta_sigma = tl.dot(w, both, delta_sigma, input_precision=DOT, out_dtype=ACC)
    delta = load_tile(weight, rows, weight_stride, offs_a, row_mask, col_mask, ACC)
    delta -= tl.load(label_weight + offs_a, mask=col_mask, other=0.0).to(ACC)[None, :]
    return delta, delta_sigma


@triton.jit
def _onto_classes(
    base, stride, rows, row_mask, weight, weight_stride, offs_c, class_mask, A,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """base[rows, :A] Wᵀ, (rows, C)."""
    total = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)
    for first in range(0, A, STEP):
        offs_a = first + tl.arange(0, STEP)
        x = load_tile(base, rows, stride, offs_a, row_mask, offs_a < A, ACC)
        w = load_tile(weight, offs_c, weight_stride, offs_a, class_mask, offs_a < A, ACC)
        total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
    return total


@triton.jit
def _onto_features(
    base, rows, row_mask, weight, weight_stride, offs_a, col_mask, C,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """base[rows, :C] W, (rows, A)."""
    total = tl.zeros([BLOCK_M, BLOCK_A], dtype=ACC)
    for first in range(0, C, STEP):
        offs_c = first + tl.arange(0, STEP)
        d = load_tile(base, rows, C, offs_c, row_mask, offs_c < C, ACC)
        w = load_tile(weight, offs_c, weight_stride, offs_a, offs_c < C, col_mask, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    return total


@triton.jit
def _class_loss(
    features, stride, weight, weight_stride, bias, covariance, epsilon, log_prior, mean, count,
    order, m, c, sign, residual,
    part_features, part_weight, part_sums, part_covariance, part_epsilon,
    alpha, beta, inv_count, C, A,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    STEP: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sum of the losses of class c, which has m > 0 rows; its parts are stored.

    W and Σ are read again, in slices, wherever a product needs them, and r, s and D pass through
    memory: kept, they would not fit into registers.
    """
    offs_c, offs_a = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_A)
    class_mask, col_mask = offs_c < C, offs_a < A
    label_mask = offs_c == c
    label_weight = weight + c * weight_stride
    class_sums = part_sums + c * C + offs_c  # R, and in the end G
    if part_weight is not None:
        class_weight = part_weight + c * C * A

    offset = tl.zeros([BLOCK_C], dtype=ACC)  # z̃ − h Wᵀ − b − ε T
    if covariance is not None:
        if mean is not None:
            _stream(
                features, stride, order, m, covariance, mean, count, c, offs_a, A,
                BLOCK_M, BLOCK_A, ACC, DOT,
            )  # fmt: skip
            tl.debug_barrier()  # Σ is read in another layout
        for first in range(0, C, BLOCK_J):
            i = first + tl.arange(0, BLOCK_J)
            delta, delta_sigma = _delta_sigma(
                weight, weight_stride, label_weight, covariance + c * A * A,
                i, i < C, offs_a, col_mask, A, BLOCK_J, BLOCK_A, ACC, DOT,
            )  # fmt: skip
            tl.store(part_sums + c * C + i, 0.5 * tl.sum(delta_sigma * delta, axis=1), mask=i < C)
            if part_weight is not None:
                ptrs = class_weight + i[:, None] * A + offs_a[None, :]
                tl.store(ptrs, delta_sigma, mask=(i < C)[:, None] & col_mask[None, :])
        tl.debug_barrier()
        offset += alpha * tl.load(class_sums, mask=class_mask, other=0.0)
    if log_prior is not None:
        offset += beta * tl.load(log_prior + offs_c, mask=class_mask, other=0.0).to(ACC)

    total = tl.zeros([BLOCK_M], dtype=ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    for start in range(0, m, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        row_mask = at < m
        rows = tl.load(order + at, mask=row_mask, other=0)
        if residual is not None:
            row_residual = residual + rows[:, None] * C + offs_c[None, :]
        z = _onto_classes(
            features, stride, rows, row_mask, weight, weight_stride, offs_c, class_mask, A,
            BLOCK_M, BLOCK_C, STEP, ACC, DOT,
        )  # fmt: skip
        if bias is not None:
            z += tl.load(bias + offs_c, mask=class_mask, other=0.0).to(ACC)[None, :]
        if epsilon is not None:
            other_mask = class_mask & (label_mask == 0)
            row_max = tl.max(tl.where(other_mask[None, :], z, float("-inf")), axis=1)
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
            r = tl.where(other_mask[None, :], tl.exp(z - row_max[:, None]), 0.0)
            mass = tl.sum(r, axis=1)
            r /= tl.where(mass > 0, mass, 1.0)[:, None]
            tl.store(row_residual, r, mask=row_mask[:, None] & class_mask[None, :])
            tl.debug_barrier()
            g = _onto_features(
                residual, rows, row_mask, weight, weight_stride, offs_a, col_mask, C,
                BLOCK_M, BLOCK_A, STEP, ACC, DOT,
            )  # fmt: skip
            g -= tl.load(label_weight + offs_a, mask=col_mask, other=0.0).to(ACC)[None, :]
            s = (g > 0).to(tl.int8) - (g < 0).to(tl.int8)
            if C == 1:
                s = tl.zeros([BLOCK_M, BLOCK_A], dtype=tl.int8)
            row_sign = sign + rows[:, None] * A + offs_a[None, :]
            tl.store(row_sign, s, mask=row_mask[:, None] & col_mask[None, :])
            tl.debug_barrier()
            sign_logits = _onto_classes(
                sign, A, rows, row_mask, weight, weight_stride, offs_c, class_mask, A,
                BLOCK_M, BLOCK_C, STEP, ACC, DOT,
            )  # fmt: skip
            eps = tl.load(epsilon + rows, mask=row_mask, other=0.0).to(ACC)
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
        if part_epsilon is not None:
            tl.store(part_epsilon + rows, tl.sum(d * sign_logits, axis=1), mask=row_mask)
        if residual is not None:
            tl.store(row_residual, d, mask=row_mask[:, None] & class_mask[None, :])

    grad = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
    if residual is not None:
        tl.debug_barrier()  # D, s and P are read in other layouts
        for start in range(0, m, BLOCK_M):
            at = start + tl.arange(0, BLOCK_M)
            row_mask = at < m
            rows = tl.load(order + at, mask=row_mask, other=0)
            if part_features is not None:
                dh = _onto_features(
                    residual, rows, row_mask, weight, weight_stride, offs_a, col_mask, C,
                    BLOCK_M, BLOCK_A, STEP, ACC, DOT,
                )  # fmt: skip
                row_grad = part_features + rows[:, None] * A + offs_a[None, :]
                tl.store(row_grad, dh, mask=row_mask[:, None] & col_mask[None, :])
            if part_weight is not None:
                x = load_tile(features, rows, stride, offs_a, row_mask, col_mask, ACC)
                if sign is not None:
                    eps = tl.load(epsilon + rows, mask=row_mask, other=0.0).to(ACC)
                    x += eps[:, None] * load_tile(sign, rows, A, offs_a, row_mask, col_mask, ACC)
                d = load_tile(residual, rows, C, offs_c, row_mask, class_mask, ACC)
                grad = tl.dot(tl.trans(d), x, grad, input_precision=DOT, out_dtype=ACC)

    if part_weight is not None:
        mask = class_mask[:, None] & col_mask[None, :]
        weight_ptrs = class_weight + offs_c[:, None] * A + offs_a[None, :]
        if covariance is not None:
            table_grad = tl.load(weight_ptrs, mask=mask, other=0.0) * (alpha * sums)[:, None]
            grad += table_grad - tl.where(
                label_mask[:, None], tl.sum(table_grad, axis=0)[None, :], 0.0
            )
            tl.debug_barrier()  # P has been read
        tl.store(weight_ptrs, grad, mask=mask)
    tl.debug_barrier()  # R has been read
    tl.store(class_sums, sums, mask=class_mask)
    if part_covariance is not None:
        tl.debug_barrier()  # G is read in slices
        term = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
        w_label = tl.load(label_weight + offs_a, mask=col_mask, other=0.0).to(ACC)
        for first in range(0, C, STEP):
            i = first + tl.arange(0, STEP)
            g_i = tl.load(part_sums + c * C + i, mask=i < C, other=0.0)
            difference = (
                load_tile(weight, i, weight_stride, offs_a, i < C, col_mask, ACC) - w_label[None, :]
            )
            scaled = g_i[:, None] * difference
            term = tl.dot(tl.trans(difference), scaled, term, input_precision=DOT, out_dtype=ACC)
        term = (0.25 * alpha) * (term + tl.trans(term))
        square = part_covariance + c * A * A + offs_a[:, None] * A + offs_a[None, :]
        tl.store(square, term, mask=col_mask[:, None] & col_mask[None, :])
    return tl.sum(total, axis=0)


@triton.jit
def single_launch_kernel(
    features, stride, weight, weight_stride, bias, labels, covariance, epsilon, log_prior,
    mean, count, order, size, losses, arrived, loss, sign, residual,
    part_features, part_weight, part_sums, part_covariance, part_epsilon,
    alpha, alpha_low, beta, beta_low, N, C, A, ignore_index,
    MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    first, m, num_valid, num_invalid = scan_rows(labels, order, c, N, C, ignore_index, BLOCK_N)
    tl.debug_barrier()  # other threads read what was stored to `order`
    inv_count = tl.cast(1.0, ACC)
    if MEAN:
        inv_count /= tl.maximum(num_valid, 1)
    total = tl.cast(0.0, ACC)
    if m > 0:
        total = _class_loss(
            features, stride, weight, weight_stride, bias, covariance, epsilon, log_prior,
            mean, count, order + first, m, c, sign, residual,
            part_features, part_weight, part_sums, part_covariance, part_epsilon,
            number(alpha, alpha_low, ACC), number(beta, beta_low, ACC), inv_count, C, A,
            BLOCK_M, BLOCK_J, BLOCK_C, BLOCK_A, STEP, ACC, DOT,
        )  # fmt: skip
    tl.store(size + c, m)
    tl.store(losses + c, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == C - 1:
        j = tl.arange(0, BLOCK_C)
        every = tl.load(losses + j, mask=j < C, other=0.0, cache_modifier=".cg")
        result = tl.sum(every, axis=0) * inv_count
        tl.store(loss, tl.where(num_invalid > 0, float("nan"), result))


class SavedParts(NamedTuple):
    """The rows of each class, size (C) int32, and in the compute dtype G and what is needed."""

    size: Tensor
    sums: Tensor
    features: Tensor | None
    weight: Tensor | None
    covariance: Tensor | None
    epsilon: Tensor | None


def is_supported(inputs: LossInputs, options: LossOptions, stream: ClassStatistics | None) -> bool:
    """Whether one launch serves: sizes within the configuration, Σ full and where it lies."""
    limit = current_configuration(inputs.features.device).single_launch
    num_classes, width = inputs.weight.shape
    dtype, sigma = inputs.compute_dtype, inputs.covariance
    if (
        options.reduction == "none"
        or len(inputs.labels) > limit.rows
        or num_classes > limit.classes
        or width > limit.width
        or _padded(num_classes) * _padded(width) * dtype.itemsize > limit.tile_bytes
    ):
        return False
    if sigma is None:
        return True
    state = [sigma] if stream is None else [sigma, stream.mean]
    return (
        sigma.dim() == 3
        and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in state)
        and (stream is None or stream.count.is_contiguous())
    )


def loss_forward(
    inputs: LossInputs, options: LossOptions, needs: LossNeeds, stream: ClassStatistics | None
) -> tuple[Tensor, SavedParts]:
    """The reduced loss and the parts of its gradients, where `is_supported`; one launch.

    `stream` and `inputs.covariance` are updated in place.
    """
    features, weight = unit_inner_stride(inputs.features), unit_inner_stride(inputs.weight)
    labels = inputs.labels.contiguous()
    vectors = (inputs.bias, inputs.epsilon, inputs.log_prior)
    bias, epsilon, log_prior = (None if v is None else v.contiguous() for v in vectors)
    count, (num_classes, width), dtype = len(labels), weight.shape, inputs.compute_dtype

    def fresh(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)

    saved = SavedParts(
        size=fresh(num_classes, dtype=torch.int32),
        sums=fresh(num_classes, num_classes),
        features=fresh(count, width) if needs.features else None,
        weight=fresh(num_classes, num_classes, width) if needs.weight else None,
        covariance=fresh(num_classes, width, width) if needs.covariance else None,
        epsilon=fresh(count) if needs.epsilon else None,
    )
    sign = None if epsilon is None else fresh(count, width, dtype=torch.int8)
    keeps_residual = sign is not None or needs.features or needs.weight
    residual = fresh(count, num_classes) if keeps_residual else None
    loss, losses, order = fresh(), fresh(num_classes), fresh(count, dtype=torch.int32)
    configuration = current_configuration(weight.device)
    tile, block_c, block_a = configuration.single_launch, _padded(num_classes), _padded(width)
    launch(
        single_launch_kernel,
        (num_classes,),
        features, features.stride(0), weight, weight.stride(0), bias, labels,
        inputs.covariance, epsilon, log_prior,
        None if stream is None else stream.mean, None if stream is None else stream.count,
        order, saved.size, losses,
        torch.zeros(1, dtype=torch.int32, device=weight.device), loss, sign, residual,
        saved.features, saved.weight, saved.sums, saved.covariance, saved.epsilon,
        *split(options.alpha), *split(options.beta), count, num_classes, width,
        options.ignore_index,
        warps=tile.warps, stages=1,
        MEAN=options.reduction == "mean", BLOCK_N=tile.group,
        BLOCK_M=min(64, max(16, tile.block_elements // block_c)),
        BLOCK_J=min(tile.class_step, block_c), BLOCK_C=block_c, BLOCK_A=block_a,
        STEP=min(tile.step, block_c, block_a),
        ACC=compute_type(dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return loss, saved


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
