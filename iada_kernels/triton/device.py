"""Parts that several kernels have in common."""

import triton
import triton.language as tl


@triton.jit
def number(high, low, ACC: tl.constexpr):
    """A Python number given as two float32, in the compute dtype."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)


@triton.jit
def load_tile(base, rows, stride, columns, row_mask, column_mask, ACC: tl.constexpr):
    """base[rows, columns] as a tile in the compute dtype, 0 outside the masks."""
    ptrs = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(base, rows, stride, columns, row_mask, column_mask, tile):
    """base[rows, columns] ← tile, in the dtype of `base`, where the masks allow."""
    ptrs = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def tile_axis(axis: tl.constexpr, BLOCK: tl.constexpr, size):
    """Indices of this program's tile along an axis of the grid, and which of them exist."""
    offs = tl.program_id(axis) * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < size


@triton.jit
def softmax_sums(
    z, rows, stride, row_mask, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """max_j z_j and Σ_j exp(z_j − max) of each row, in two passes over its tiles."""
    row_max = tl.full([BLOCK_N], float("-inf"), dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, stride, offs_c, row_mask, offs_c < C, ACC)
        tile = tl.where((offs_c < C)[None, :], tile, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(tile, axis=1))
    total = tl.zeros([BLOCK_N], dtype=ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        tile = load_tile(z, rows, stride, offs_c, row_mask, offs_c < C, ACC)
        p = tl.where((offs_c < C)[None, :], tl.exp(tile - row_max[:, None]), 0.0)
        total += tl.sum(p, axis=1)
    return row_max, total


@triton.jit
def load_labels(labels, rows, mask, ignore_index, C):
    """(class or -1 where the row does not count, whether it should count but has no class)."""
    y = tl.load(labels + rows, mask=mask, other=-1)
    counts = mask & (y != ignore_index)
    has_class = (y >= 0) & (y < C)
    return tl.where(counts & has_class, y, -1).to(tl.int32), counts & (has_class == 0)
