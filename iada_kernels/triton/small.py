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
loss; `small_backward` adds the parts of the classes and multiplies by the gradient of the loss. The
program that finishes last adds the losses of the classes, in their order.

features (N, A) · weight (C, A) · covariance (C, A, A) · Parts, written for classes that have rows:
∂h (N, A) and ∂ε (N) at their rows, ∂W (C, C, A), G (C, C), ∂Σ (C, A, A).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import ClassStatistics, LossInputs, LossNeeds, LossOptions
from iada_kernels.triton.device import load_tile, number
from iada_kernels.triton.launch import (
    by_rows,
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
    features, stride, order, m, covariance, mean, count, c, a, A,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The streaming update of Σ_c, μ_c and n_c, in place."""
    inside = a < A
    center = class_mean(features, stride, order, m, a, inside, BLOCK_M, BLOCK_A, ACC)
    grown = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
    for k in range(0, m, BLOCK_M):
        at = k + tl.arange(0, BLOCK_M)
        rows = tl.load(order + at, mask=at < m, other=0)
        x = load_tile(features, rows, stride, a, at < m, inside, ACC)
        x = tl.where((at < m)[:, None], x - center[None, :], 0.0)
        grown = tl.dot(tl.trans(x), x, grown, input_precision=DOT, out_dtype=ACC)
    grown = 0.5 * (grown + tl.trans(grown))  # the two halves differ by rounding

    place = covariance + c * A * A + a[:, None] * A + a[None, :]
    mask = inside[:, None] & inside[None, :]
    s = tl.load(place, mask=mask, other=0.0)
    old = tl.load(mean + c * A + a, mask=inside, other=0.0)
    n = tl.load(count + c)
    tl.debug_barrier()  # several threads may read what one of them writes now
    w = tl.cast(m, ACC) / tl.cast(n + m, ACC)
    shift = center - old
    between = shift[:, None] * shift[None, :]
    s = (1 - w) * s + ((w / m) * grown + (w * (1 - w)) * between)
    tl.store(place, s, mask=mask)
    tl.store(mean + c * A + a, old + w * shift, mask=inside)
    tl.store(count + c, n + m)


@triton.jit
def _turned(
    weight, weight_stride, own_weight, sigma, j, there, a, inside, A,
    BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Δ = W − 1 w_cᵀ and P = Δ ½(Σ + Σᵀ) for some classes j, (BLOCK_J, A)."""
    turned = tl.zeros([BLOCK_J, BLOCK_A], dtype=ACC)
    for first in range(0, A, 16):
        k = first + tl.arange(0, 16)
        deep = k < A
        mask = deep[:, None] & inside[None, :]
        both = tl.load(sigma + k[:, None] * A + a[None, :], mask=mask, other=0.0)
        mirror = tl.load(sigma + a[:, None] * A + k[None, :], mask=tl.trans(mask), other=0.0)
        both = 0.5 * (both + tl.trans(mirror))
        w = load_tile(weight, j, weight_stride, k, there, deep, ACC)
        w -= tl.load(own_weight + k, mask=deep, other=0.0).to(ACC)[None, :]
        turned = tl.dot(w, both, turned, input_precision=DOT, out_dtype=ACC)
    delta = load_tile(weight, j, weight_stride, a, there, inside, ACC)
    delta -= tl.load(own_weight + a, mask=inside, other=0.0).to(ACC)[None, :]
    return delta, turned


@triton.jit
def _onto_classes(
    base, stride, rows, valid, weight, weight_stride, j, there, A,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """base[rows, :A] Wᵀ, (rows, C)."""
    total = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)
    for first in range(0, A, STEP):
        a = first + tl.arange(0, STEP)
        x = load_tile(base, rows, stride, a, valid, a < A, ACC)
        w = load_tile(weight, j, weight_stride, a, there, a < A, ACC)
        total = tl.dot(x, tl.trans(w), total, input_precision=DOT, out_dtype=ACC)
    return total


@triton.jit
def _onto_features(
    base, rows, valid, weight, weight_stride, a, inside, C,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """base[rows, :C] W, (rows, A)."""
    total = tl.zeros([BLOCK_M, BLOCK_A], dtype=ACC)
    for first in range(0, C, STEP):
        j = first + tl.arange(0, STEP)
        d = load_tile(base, rows, C, j, valid, j < C, ACC)
        w = load_tile(weight, j, weight_stride, a, j < C, inside, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    return total


@triton.jit
def _class_loss(
    features, stride, weight, weight_stride, bias, covariance, epsilon, log_prior, mean, count,
    order, m, c, sign, residual,
    part_features, part_weight, part_sums, part_covariance, part_epsilon,
    strength, prior_strength, share, C, A,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    STEP: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sum of the losses of class c, which has m > 0 rows; its parts are stored.

    W and Σ are read again, in slices, wherever a product needs them, and r, s and D pass through
    memory: kept, they would not fit into registers.
    """
    j, a = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_A)
    there, inside = j < C, a < A
    own = j == c
    own_weight = weight + c * weight_stride
    class_sums = part_sums + c * C + j  # R, and in the end G
    if part_weight is not None:
        class_weight = part_weight + c * C * A

    offset = tl.zeros([BLOCK_C], dtype=ACC)  # z̃ − h Wᵀ − b − ε T
    if covariance is not None:
        if mean is not None:
            _stream(
                features, stride, order, m, covariance, mean, count, c, a, A,
                BLOCK_M, BLOCK_A, ACC, DOT,
            )  # fmt: skip
            tl.debug_barrier()  # Σ is read in another layout
        for first in range(0, C, BLOCK_J):
            i = first + tl.arange(0, BLOCK_J)
            delta, turned = _turned(
                weight, weight_stride, own_weight, covariance + c * A * A, i, i < C, a, inside, A,
                BLOCK_J, BLOCK_A, ACC, DOT,
            )  # fmt: skip
            tl.store(part_sums + c * C + i, 0.5 * tl.sum(turned * delta, axis=1), mask=i < C)
            if part_weight is not None:
                place = class_weight + i[:, None] * A + a[None, :]
                tl.store(place, turned, mask=(i < C)[:, None] & inside[None, :])
        tl.debug_barrier()
        offset += strength * tl.load(class_sums, mask=there, other=0.0)
    if log_prior is not None:
        offset += prior_strength * tl.load(log_prior + j, mask=there, other=0.0).to(ACC)

    total = tl.zeros([BLOCK_M], dtype=ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    for start in range(0, m, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        valid = at < m
        rows = tl.load(order + at, mask=valid, other=0)
        if residual is not None:
            row_residual = residual + rows[:, None] * C + j[None, :]
        z = _onto_classes(
            features, stride, rows, valid, weight, weight_stride, j, there, A,
            BLOCK_M, BLOCK_C, STEP, ACC, DOT,
        )  # fmt: skip
        if bias is not None:
            z += tl.load(bias + j, mask=there, other=0.0).to(ACC)[None, :]
        if epsilon is not None:
            others = there & (own == 0)
            high = tl.max(tl.where(others[None, :], z, float("-inf")), axis=1)
            high = tl.where(high == float("-inf"), 0.0, high)
            r = tl.where(others[None, :], tl.exp(z - high[:, None]), 0.0)
            mass = tl.sum(r, axis=1)
            r /= tl.where(mass > 0, mass, 1.0)[:, None]
            tl.store(row_residual, r, mask=valid[:, None] & there[None, :])
            tl.debug_barrier()
            g = _onto_features(
                residual, rows, valid, weight, weight_stride, a, inside, C,
                BLOCK_M, BLOCK_A, STEP, ACC, DOT,
            )  # fmt: skip
            g -= tl.load(own_weight + a, mask=inside, other=0.0).to(ACC)[None, :]
            s = (g > 0).to(tl.int8) - (g < 0).to(tl.int8)
            if C == 1:
                s = tl.zeros([BLOCK_M, BLOCK_A], dtype=tl.int8)
            row_sign = sign + rows[:, None] * A + a[None, :]
            tl.store(row_sign, s, mask=valid[:, None] & inside[None, :])
            tl.debug_barrier()
            turn = _onto_classes(
                sign, A, rows, valid, weight, weight_stride, j, there, A,
                BLOCK_M, BLOCK_C, STEP, ACC, DOT,
            )  # fmt: skip
            move = tl.load(epsilon + rows, mask=valid, other=0.0).to(ACC)
            z += move[:, None] * turn
        z += offset[None, :]
        high = tl.max(tl.where(there[None, :], z, float("-inf")), axis=1)
        d = tl.where(there[None, :], tl.exp(z - high[:, None]), 0.0)
        mass = tl.sum(d, axis=1)
        z_own = tl.sum(tl.where(own[None, :], z, 0.0), axis=1)
        total += tl.where(valid, tl.log(mass) + (high - z_own), 0.0)
        # D_y = −Σ_{j≠y} p_j keeps the digits that p_y − 1 loses on a confident sample.
        d = tl.where(own[None, :], 0.0, d / mass[:, None])
        d = tl.where(own[None, :], -tl.sum(d, axis=1)[:, None], d)
        d = tl.where(valid[:, None], d * share, 0.0)
        sums += tl.sum(d, axis=0)
        if part_epsilon is not None:
            tl.store(part_epsilon + rows, tl.sum(d * turn, axis=1), mask=valid)
        if residual is not None:
            tl.store(row_residual, d, mask=valid[:, None] & there[None, :])

    grad = tl.zeros([BLOCK_C, BLOCK_A], dtype=ACC)
    if residual is not None:
        tl.debug_barrier()  # D, s and P are read in other layouts
        for start in range(0, m, BLOCK_M):
            at = start + tl.arange(0, BLOCK_M)
            valid = at < m
            rows = tl.load(order + at, mask=valid, other=0)
            if part_features is not None:
                dh = _onto_features(
                    residual, rows, valid, weight, weight_stride, a, inside, C,
                    BLOCK_M, BLOCK_A, STEP, ACC, DOT,
                )  # fmt: skip
                row_grad = part_features + rows[:, None] * A + a[None, :]
                tl.store(row_grad, dh, mask=valid[:, None] & inside[None, :])
            if part_weight is not None:
                x = load_tile(features, rows, stride, a, valid, inside, ACC)
                if sign is not None:
                    move = tl.load(epsilon + rows, mask=valid, other=0.0).to(ACC)
                    x += move[:, None] * load_tile(sign, rows, A, a, valid, inside, ACC)
                d = load_tile(residual, rows, C, j, valid, there, ACC)
                grad = tl.dot(tl.trans(d), x, grad, input_precision=DOT, out_dtype=ACC)

    if part_weight is not None:
        mask = there[:, None] & inside[None, :]
        class_place = class_weight + j[:, None] * A + a[None, :]
        if covariance is not None:
            pull = tl.load(class_place, mask=mask, other=0.0) * (strength * sums)[:, None]
            grad += pull - tl.where(own[:, None], tl.sum(pull, axis=0)[None, :], 0.0)
            tl.debug_barrier()  # P has been read
        tl.store(class_place, grad, mask=mask)
    tl.debug_barrier()  # R has been read
    tl.store(class_sums, sums, mask=there)
    if part_covariance is not None:
        tl.debug_barrier()  # G is read in slices
        term = tl.zeros([BLOCK_A, BLOCK_A], dtype=ACC)
        w_own = tl.load(own_weight + a, mask=inside, other=0.0).to(ACC)
        for first in range(0, C, STEP):
            i = first + tl.arange(0, STEP)
            g_i = tl.load(part_sums + c * C + i, mask=i < C, other=0.0)
            difference = load_tile(weight, i, weight_stride, a, i < C, inside, ACC) - w_own[None, :]
            scaled = g_i[:, None] * difference
            term = tl.dot(tl.trans(difference), scaled, term, input_precision=DOT, out_dtype=ACC)
        term = (0.25 * strength) * (term + tl.trans(term))
        square = part_covariance + c * A * A + a[:, None] * A + a[None, :]
        tl.store(square, term, mask=inside[:, None] & inside[None, :])
    return tl.sum(total, axis=0)


@triton.jit
def small_kernel(
    features, stride, weight, weight_stride, bias, labels, covariance, epsilon, log_prior,
    mean, count, order, size, losses, arrived, loss, sign, residual,
    part_features, part_weight, part_sums, part_covariance, part_epsilon,
    alpha, alpha_low, beta, beta_low, N, C, A, ignore_index,
    MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    first, m, counted, wrong = scan_rows(labels, order, c, N, C, ignore_index, BLOCK_N)
    tl.debug_barrier()  # other threads read what was stored to `order`
    share = tl.cast(1.0, ACC)
    if MEAN:
        share /= tl.maximum(counted, 1)
    total = tl.cast(0.0, ACC)
    if m > 0:
        total = _class_loss(
            features, stride, weight, weight_stride, bias, covariance, epsilon, log_prior,
            mean, count, order + first, m, c, sign, residual,
            part_features, part_weight, part_sums, part_covariance, part_epsilon,
            number(alpha, alpha_low, ACC), number(beta, beta_low, ACC), share, C, A,
            BLOCK_M, BLOCK_J, BLOCK_C, BLOCK_A, STEP, ACC, DOT,
        )  # fmt: skip
    tl.store(size + c, m)
    tl.store(losses + c, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == C - 1:
        j = tl.arange(0, BLOCK_C)
        every = tl.load(losses + j, mask=j < C, other=0.0, cache_modifier=".cg")
        result = tl.sum(every, axis=0) * share
        tl.store(loss, tl.where(wrong > 0, float("nan"), result))


class SavedParts(NamedTuple):
    """The rows of each class, size (C) int32, and in the compute dtype G and what is needed."""

    size: Tensor
    sums: Tensor
    features: Tensor | None
    weight: Tensor | None
    covariance: Tensor | None
    epsilon: Tensor | None


def fits(inputs: LossInputs, options: LossOptions, stream: ClassStatistics | None) -> bool:
    """Whether one launch serves: sizes within the configuration, Σ full and where it lies."""
    limit = current_configuration(inputs.features.device).small
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
    """The reduced loss and the parts of its gradients, where `fits`; one launch.

    `stream` and `inputs.covariance` are updated in place.
    """
    features, weight = by_rows(inputs.features), by_rows(inputs.weight)
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
    kept = sign is not None or needs.features or needs.weight
    residual = fresh(count, num_classes) if kept else None
    loss, losses, order = fresh(), fresh(num_classes), fresh(count, dtype=torch.int32)
    configuration = current_configuration(weight.device)
    tile, block_c, block_a = configuration.small, _padded(num_classes), _padded(width)
    launch(
        small_kernel,
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
        BLOCK_M=min(64, max(16, tile.row_numbers // block_c)),
        BLOCK_J=min(tile.classes_at_once, block_c), BLOCK_C=block_c, BLOCK_A=block_a,
        STEP=min(tile.step, block_c, block_a),
        ACC=compute_type(dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return loss, saved


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
