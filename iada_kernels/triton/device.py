"""What several kernels compute in the same way."""

import triton
import triton.language as tl


@triton.jit
def number(high, low, ACC: tl.constexpr):
    """A Python number given as two float32, in the compute dtype."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)


@triton.jit
def load_tile(base, rows, stride, columns, row_mask, column_mask, ACC: tl.constexpr):
    """base[rows, columns] as a tile in the compute dtype, 0 outside the masks."""
    place = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(place, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_labels(labels, rows, mask, ignore_index, C):
    """(class or -1 where the row does not count, whether it should count but has no class)."""
    y = tl.load(labels + rows, mask=mask, other=-1)
    counts = mask & (y != ignore_index)
    has_class = (y >= 0) & (y < C)
    return tl.where(counts & has_class, y, -1).to(tl.int32), counts & (has_class == 0)
