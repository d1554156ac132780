"""Parts that several kernels have in common."""

import triton
import triton.language as tl
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

from iada_kernels.triton.launch import INTERPRETED

ANY_CACHE = tl.constexpr("")  # as a default; a plain string cannot be one in Triton 3.6


@triton.jit
def number(value, ACC: tl.constexpr):
    """A Python number, which `launch.split` gave as two float32, in the compute dtype."""
    return tl.cast(value.high, ACC) + tl.cast(value.low, ACC)


@constexpr_function
def wait_instruction():
    """By which a wave of an AMD GPU waits for its loads and stores; empty elsewhere.

    A barrier there waits for what a program keeps beside it, not for memory; NVIDIA's for both.
    """
    target = None if INTERPRETED else current_target()
    if target is None or target.backend != "hip":
        return ""
    if target.arch.startswith("gfx9"):
        wait = "s_waitcnt vmcnt(0)"
    elif target.arch.startswith("gfx12"):
        wait = "s_wait_loadcnt 0x0\ns_wait_storecnt 0x0"
    else:
        wait = "s_waitcnt vmcnt(0)\ns_waitcnt_vscnt null, 0x0"
    return wait + "\nv_mov_b32 $0, $1"


@triton.jit
def wait_for_memory():
    """Before a barrier, behind which other threads or programs read what was stored, or store."""
    WAIT: tl.constexpr = wait_instruction()
    if WAIT != "":
        tl.inline_asm_elementwise(
            WAIT, "=v,v", [tl.arange(0, 64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def set_to_zero(counters, count):
    """By one program, before a launch in which programs count."""
    for first in range(0, count, 256):
        at = first + tl.arange(0, 256)
        tl.store(counters + at, tl.zeros([256], dtype=tl.int32), mask=at < count)


@triton.jit
def load_tile(
    base, rows, stride, columns, row_mask, column_mask,
    ACC: tl.constexpr, CACHE: tl.constexpr = ANY_CACHE,
):  # fmt: skip
    """base[rows, columns] as a tile in the compute dtype, 0 outside the masks.

    CACHE = ".cg" reads past the first-level cache, what other multiprocessors have stored.
    """
    ptrs = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=CACHE).to(ACC)


@triton.jit
def store_tile(base, rows, stride, columns, row_mask, column_mask, tile):
    """base[rows, columns] ← tile, in the dtype of `base`, where the masks allow."""
    ptrs = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def tile_at(index, BLOCK: tl.constexpr, size):
    """Indices of a tile along an axis, and which of them exist."""
    offs = index * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < size


@triton.jit
def tile_axis(axis: tl.constexpr, BLOCK: tl.constexpr, size):
    """`tile_at` for this program's index along an axis of the grid."""
    return tile_at(tl.program_id(axis), BLOCK, size)


@triton.jit
def softmax_sums(
    z, rows, stride, row_mask, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, CACHE: tl.constexpr = ANY_CACHE,
):  # fmt: skip
    """max_j z_j and Σ_j exp(z_j − max) of each row, in two passes over its tiles."""
    row_max = tl.full([BLOCK_N], float("-inf"), dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, stride, offs_c, row_mask, offs_c < C, ACC, CACHE)
        tile = tl.where((offs_c < C)[None, :], tile, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(tile, axis=1))
    total = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, stride, offs_c, row_mask, offs_c < C, ACC, CACHE)
        p = tl.where((offs_c < C)[None, :], tl.exp(tile - row_max[:, None]), 0.0)
        total += tl.sum(p, axis=1)
    return row_max, total


@triton.jit
def load_labels(labels, rows, mask, C):
    """(class or -1 where the row does not count, whether it should count but has no class)."""
    y = tl.load(labels.classes + rows, mask=mask, other=-1)
    counts = mask & (y != labels.ignore_index)
    has_class = (y >= 0) & (y < C)
    return tl.where(counts & has_class, y, -1).to(tl.int32), counts & (has_class == 0)


@triton.jit
def samples_at(labels, index, BLOCK_N: tl.constexpr, N, C):
    """The samples of a tile, which of them exist, and their classes as `load_labels` does."""
    rows, row_mask = tile_at(index, BLOCK_N, N)
    y, no_class = load_labels(labels, rows, row_mask, C)
    return rows, row_mask, y, no_class


@triton.jit
def load_epsilon(samples, rows, row_mask, ACC: tl.constexpr):
    """ε of these rows, for `load_samples`; 0 where there is none."""
    if samples.sign is None:
        eps = 0.0
    else:
        eps = tl.load(samples.epsilon + rows, mask=row_mask, other=0.0).to(ACC)
    return eps


@triton.jit
def load_samples(samples, eps, rows, columns, row_mask, column_mask, A, ACC: tl.constexpr):
    """h + ε s as a tile in the compute dtype; with eps=None ε is read here."""
    x = load_tile(samples.features, rows, samples.stride, columns, row_mask, column_mask, ACC)
    if samples.sign is not None:
        if eps is None:
            eps = tl.load(samples.epsilon + rows, mask=row_mask, other=0.0).to(ACC)
        x += eps[:, None] * load_tile(samples.sign, rows, A, columns, row_mask, column_mask, ACC)
    return x


@triton.jit
def load_table(table, y, columns, row_mask, column_mask, ACC: tl.constexpr):
    """R[y, columns] for each row, 0 where a row does not count."""
    mask = row_mask & (y >= 0)
    return load_tile(table.base, tl.maximum(y, 0), table.stride, columns, mask, column_mask, ACC)


@triton.jit
def onto_features(
    base, rows, row_mask, weight, weight_stride, offs_a, col_mask, C,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """base[rows, :C] W, (rows, A)."""
    total = tl.zeros([BLOCK_N, BLOCK_A], dtype=ACC)
    for first in range(0, C, STEP):
        offs_c = first + tl.arange(0, STEP)
        d = load_tile(base, rows, C, offs_c, row_mask, offs_c < C, ACC)
        w = load_tile(weight, offs_c, weight_stride, offs_a, offs_c < C, col_mask, ACC)
        total = tl.dot(d, w, total, input_precision=DOT, out_dtype=ACC)
    return total
