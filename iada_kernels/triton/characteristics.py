"""The eight characteristics that a batch shows by itself, in one kernel.

The columns are in `reference.characteristics`. A program takes a few rows: one look at their logits
for the largest, a second for what follows from p = softmax(z); one at the features for cosines with
w_y; and for the neighbours, cosines with the whole batch, tile by tile. Of these it keeps the k
best so far, by k rounds of taking the largest of a tile and of the list.

features (N, A) · logits (N, C) · labels (N) in [0, C) · weight (C, A) → (N, 8).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import load_tile
from iada_kernels.triton.launch import (
    by_rows,
    compute_type,
    current_configuration,
    dot_precision,
    launch,
)

COLUMNS = 8


@triton.jit
def _inverse_norms(
    features, stride, rows, there, A, BLOCK: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr
):
    total = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        a = first + tl.arange(0, BLOCK_A)
        h = load_tile(features, rows, stride, a, there, a < A, ACC)
        total += tl.sum(h * h, axis=1)
    return 1.0 / tl.maximum(tl.sqrt(total), 1e-12)


@triton.jit
def _take_best(similarity, same, count: tl.constexpr, best, best_same, K: tl.constexpr):
    """The K largest of `best` (n, K) and `similarity` (n, count), with their flags."""
    place = tl.arange(0, count)[None, :]
    slot = tl.arange(0, K)[None, :]
    for _ in range(K):
        high = tl.max(similarity, axis=1)
        at = tl.argmax(similarity, axis=1)
        flag = tl.sum(tl.where(place == at[:, None], same, 0.0), axis=1)
        low = tl.min(best, axis=1)
        low_at = tl.argmin(best, axis=1)
        better = (high > low)[:, None] & (slot == low_at[:, None])
        best = tl.where(better, high[:, None], best)
        best_same = tl.where(better, flag[:, None], best_same)
        similarity = tl.where(place == at[:, None], float("-inf"), similarity)
    return best, best_same


@triton.jit
def characteristics_kernel(
    features, stride, logits, logits_stride, labels, weight, out, N, C, A, neighbours,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
    K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < N
    y = tl.load(labels + rows, mask=there, other=0).to(tl.int32)
    own_z = tl.load(logits + rows.to(tl.int64) * logits_stride + y, mask=there, other=0.0).to(ACC)
    high = tl.full([BLOCK_N], float("-inf"), dtype=ACC)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        z = load_tile(logits, rows, logits_stride, j, there, j < C, ACC)
        high = tl.maximum(high, tl.max(tl.where((j < C)[None, :], z, float("-inf")), axis=1))
    total = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        z = load_tile(logits, rows, logits_stride, j, there, j < C, ACC)
        total += tl.sum(tl.where((j < C)[None, :], tl.exp(z - high[:, None]), 0.0), axis=1)
    spread = tl.log(total)
    rival = tl.zeros([BLOCK_N], dtype=ACC)
    others = tl.zeros([BLOCK_N], dtype=ACC)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    entropy = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        z = load_tile(logits, rows, logits_stride, j, there, j < C, ACC)
        log_p = (z - high[:, None]) - spread[:, None]
        p = tl.where((j < C)[None, :], tl.exp(log_p), 0.0)
        entropy -= tl.sum(tl.where(p > 0, p * log_p, 0.0), axis=1)
        p = tl.where(j[None, :] == y[:, None], 0.0, p)
        rival = tl.maximum(rival, tl.max(p, axis=1))
        others += tl.sum(p, axis=1)
        squares += tl.sum(p * p, axis=1)
    own = tl.exp((own_z - high) - spread)

    inner = tl.zeros([BLOCK_N], dtype=ACC)
    length = tl.zeros([BLOCK_N], dtype=ACC)
    norm = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, A, BLOCK_A):
        a = first + tl.arange(0, BLOCK_A)
        h = load_tile(features, rows, stride, a, there, a < A, ACC)
        w = load_tile(weight, y, A, a, there, a < A, ACC)
        inner += tl.sum(h * w, axis=1)
        length += tl.sum(h * h, axis=1)
        norm += tl.sum(w * w, axis=1)
    length, norm = tl.sqrt(length), tl.sqrt(norm)
    cosine = inner / tl.maximum(length, 1e-8) / tl.maximum(norm, 1e-8)

    # Slots beyond the neighbours asked for start at +inf, so that nothing takes their place.
    slot = tl.arange(0, K)[None, :]
    best = tl.where(slot < neighbours, float("-inf"), float("inf"))
    best = tl.broadcast_to(best, [BLOCK_N, K]).to(ACC)
    best_same = tl.zeros([BLOCK_N, K], dtype=ACC)
    if neighbours > 0:
        scale = 1.0 / tl.maximum(length, 1e-12)
        for first in range(0, N, BLOCK_M):
            fellows = first + tl.arange(0, BLOCK_M)
            near = fellows < N
            product = tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)
            for begin in range(0, A, BLOCK_A):
                a = begin + tl.arange(0, BLOCK_A)
                h = load_tile(features, rows, stride, a, there, a < A, ACC)
                f = load_tile(features, fellows, stride, a, near, a < A, ACC)
                product = tl.dot(h, tl.trans(f), product, input_precision=DOT, out_dtype=ACC)
            fellow_scale = _inverse_norms(features, stride, fellows, near, A, BLOCK_M, BLOCK_A, ACC)
            product = product * scale[:, None] * fellow_scale[None, :]
            valid = near[None, :] & (fellows[None, :] != rows[:, None])
            product = tl.where(valid, product, float("-inf"))
            label = tl.load(labels + fellows, mask=near, other=-1).to(tl.int32)
            same = (label[None, :] == y[:, None]).to(ACC)
            best, best_same = _take_best(product, same, BLOCK_M, best, best_same, K)
    share = tl.sum(tl.where(slot < neighbours, best_same, 0.0), axis=1)
    share /= tl.maximum(neighbours, 1)

    place = out + rows.to(tl.int64) * 8
    tl.store(place, spread + (high - own_z), mask=there)
    tl.store(place + 1, own - rival, mask=there)
    tl.store(place + 2, tl.sqrt(others * others + squares), mask=there)
    tl.store(place + 3, cosine, mask=there)
    tl.store(place + 4, entropy, mask=there)
    tl.store(place + 5, norm, mask=there)
    tl.store(place + 6, own, mask=there)
    tl.store(place + 7, share, mask=there)


def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """(N, 8) in the dtype of the logits, at least float32. One launch."""
    dtype = torch.promote_types(torch.float32, logits.dtype)
    configuration = current_configuration(features.device)
    tile, (count, num_classes) = configuration.statistics, logits.shape
    features, logits = by_rows(features), by_rows(logits)
    out = torch.empty(count, COLUMNS, dtype=dtype, device=features.device)
    k = max(0, min(neighbours, count - 1))
    launch(
        characteristics_kernel,
        (triton.cdiv(count, tile.rows),),
        features, features.stride(0), logits, logits.stride(0), labels.contiguous(),
        weight.contiguous(), out, count, num_classes, weight.shape[1], k,
        warps=tile.warps, stages=tile.stages,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth, BLOCK_M=tile.columns,
        K=triton.next_power_of_2(max(k, 2)), ACC=compute_type(dtype),
        DOT=dot_precision(configuration),
    )  # fmt: skip
    return out
