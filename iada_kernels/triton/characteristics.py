"""The eight characteristics that follow from the batch alone, in one kernel.

The columns are in `reference.characteristics`. A program takes a few rows. It reads their logits
three times, for the maximum, the sum and what follows from p = softmax(z), their features for the
cosine with w_y, and all features of the batch, tile by tile, for the cosines with the others. Of
these it keeps the k largest so far, by k rounds of exchanging the largest of a tile for the
smallest kept.

features (N, A) · logits (N, C) · labels (N) · weight (C, A) → (N, 8). A label outside [0, C) makes
its row NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.layout import unit_inner_stride
from iada_kernels.triton.config import cdiv
from iada_kernels.triton.device import load_tile, softmax_sums, tile_axis
from iada_kernels.triton.launch import current_configuration, launch, planned
from iada_kernels.triton.records import Sizes, as_operand

COLUMNS = 8


@triton.jit
def _inverse_norms(
    features, stride, rows, row_mask, A,
    BLOCK: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        offs_a = first + tl.arange(0, BLOCK_A)
        h = load_tile(features, rows, stride, offs_a, row_mask, offs_a < A, ACC)
        total += tl.sum(h * h, axis=1)
    return 1.0 / tl.maximum(tl.sqrt(total), 1e-12)


@triton.jit
def _take_best(similarity, same, count: tl.constexpr, best, best_same, K: tl.constexpr):
    """The K largest of `best` (n, K) and `similarity` (n, count), with their flags."""
    position = tl.arange(0, count)[None, :]
    slot = tl.arange(0, K)[None, :]
    for _ in range(K):
        high = tl.max(similarity, axis=1)
        at = tl.argmax(similarity, axis=1)
        flag = tl.sum(tl.where(position == at[:, None], same, 0.0), axis=1)
        low = tl.min(best, axis=1)
        low_at = tl.argmin(best, axis=1)
        better = (high > low)[:, None] & (slot == low_at[:, None])
        best = tl.where(better, high[:, None], best)
        best_same = tl.where(better, flag[:, None], best_same)
        similarity = tl.where(position == at[:, None], float("-inf"), similarity)
    return best, best_same


@triton.jit
def characteristics_kernel(
    features, stride, logits, logits_stride, labels, weight, out, sizes, num_neighbours,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
    K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    rows, row_mask = tile_axis(0, BLOCK_N, N)
    y = tl.load(labels + rows, mask=row_mask, other=0)
    blank = tl.where((y >= 0) & (y < C), 0.0, float("nan"))
    y = tl.where((y >= 0) & (y < C), y, 0).to(tl.int32)  # an address
    label_z = tl.load(logits + rows.to(tl.int64) * logits_stride + y, mask=row_mask, other=0.0).to(
        ACC
    )
    row_max, total = softmax_sums(logits, rows, logits_stride, row_mask, C, BLOCK_N, BLOCK_C, ACC)
    log_total = tl.log(total)
    runner_up = tl.zeros([BLOCK_N], dtype=ACC)
    others = tl.zeros([BLOCK_N], dtype=ACC)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    entropy = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        z = load_tile(logits, rows, logits_stride, offs_c, row_mask, offs_c < C, ACC)
        log_p = (z - row_max[:, None]) - log_total[:, None]
        p = tl.where((offs_c < C)[None, :], tl.exp(log_p), 0.0)
        entropy -= tl.sum(tl.where(p > 0, p * log_p, 0.0), axis=1)
        p = tl.where(offs_c[None, :] == y[:, None], 0.0, p)
        runner_up = tl.maximum(runner_up, tl.max(p, axis=1))
        others += tl.sum(p, axis=1)
        squares += tl.sum(p * p, axis=1)
    label_p = tl.exp((label_z - row_max) - log_total)

    inner = tl.zeros([BLOCK_N], dtype=ACC)
    h_norm = tl.zeros([BLOCK_N], dtype=ACC)
    w_norm = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        offs_a = first + tl.arange(0, BLOCK_A)
        h = load_tile(features, rows, stride, offs_a, row_mask, offs_a < A, ACC)
        w = load_tile(weight, y, A, offs_a, row_mask, offs_a < A, ACC)
        inner += tl.sum(h * w, axis=1)
        h_norm += tl.sum(h * h, axis=1)
        w_norm += tl.sum(w * w, axis=1)
    h_norm, w_norm = tl.sqrt(h_norm), tl.sqrt(w_norm)
    cosine = inner / tl.maximum(h_norm, 1e-8) / tl.maximum(w_norm, 1e-8)

    # Slots beyond the neighbours asked for start at +inf, so that nothing takes their place.
    slot = tl.arange(0, K)[None, :]
    best = tl.where(slot < num_neighbours, float("-inf"), float("inf"))
    best = tl.broadcast_to(best, [BLOCK_N, K]).to(ACC)
    best_same = tl.zeros([BLOCK_N, K], dtype=ACC)
    if num_neighbours > 0:
        scale = 1.0 / tl.maximum(h_norm, 1e-12)
        for first in range(0, N, BLOCK_M):
            neighbours = first + tl.arange(0, BLOCK_M)
            neighbour_mask = neighbours < N
            product = tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)
            for begin in range(0, A, BLOCK_A):
                offs_a = begin + tl.arange(0, BLOCK_A)
                h = load_tile(features, rows, stride, offs_a, row_mask, offs_a < A, ACC)
                f = load_tile(features, neighbours, stride, offs_a, neighbour_mask, offs_a < A, ACC)
                product = tl.dot(h, tl.trans(f), product, input_precision=DOT, out_dtype=ACC)
            neighbour_scale = _inverse_norms(
                features, stride, neighbours, neighbour_mask, A, BLOCK_M, BLOCK_A, ACC
            )
            product = product * scale[:, None] * neighbour_scale[None, :]
            pair_mask = neighbour_mask[None, :] & (neighbours[None, :] != rows[:, None])
            product = tl.where(pair_mask, product, float("-inf"))
            label = tl.load(labels + neighbours, mask=neighbour_mask, other=-1).to(tl.int32)
            same_class = (label[None, :] == y[:, None]).to(ACC)
            best, best_same = _take_best(product, same_class, BLOCK_M, best, best_same, K)
    fraction = tl.sum(tl.where(slot < num_neighbours, best_same, 0.0), axis=1)
    fraction /= tl.maximum(num_neighbours, 1)

    ptrs = out + rows.to(tl.int64) * 8
    tl.store(ptrs, log_total + (row_max - label_z) + blank, mask=row_mask)
    tl.store(ptrs + 1, label_p - runner_up + blank, mask=row_mask)
    tl.store(ptrs + 2, tl.sqrt(others * others + squares) + blank, mask=row_mask)
    tl.store(ptrs + 3, cosine + blank, mask=row_mask)
    tl.store(ptrs + 4, entropy + blank, mask=row_mask)
    tl.store(ptrs + 5, w_norm + blank, mask=row_mask)
    tl.store(ptrs + 6, label_p + blank, mask=row_mask)
    tl.store(ptrs + 7, fraction + blank, mask=row_mask)


@planned
def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """(N, 8) in the dtype of the logits, at least float32. One launch."""
    dtype = torch.promote_types(torch.float32, logits.dtype)
    configuration = current_configuration(features.device)
    tile, (count, num_classes) = configuration.statistics, logits.shape
    features, logits = as_operand(features, dtype), unit_inner_stride(logits)
    out = torch.empty(count, COLUMNS, dtype=dtype, device=features.device)
    k = max(0, min(neighbours, count - 1))
    launch(
        characteristics_kernel, (cdiv(count, tile.rows),),
        features, features.stride(0), logits, logits.stride(0), labels.contiguous(),
        weight.contiguous(), out, Sizes(count, num_classes, weight.shape[1]), k,
        like=out, tile=tile,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth, BLOCK_M=tile.columns,
        K=triton.next_power_of_2(max(k, 2)),
    )  # fmt: skip
    return out
