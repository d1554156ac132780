"""Scratch is cut into blocks, so that no temporary grows with N·A, N·C·A or N·A·A."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # 4 MiB of float32: large enough for GEMM, small enough for a cache


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices that cover range(count), each of at most BLOCK_ELEMENTS // width items (or one).

    An empty range is one empty slice.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, max(1, count), step):
        yield slice(start, min(start + step, count))


def is_one_block(count: int, width: int) -> bool:
    """Whether `blocks(count, width)` yields at most one slice."""
    return count * width <= BLOCK_ELEMENTS


def join(parts: list[Tensor]) -> Tensor:
    """The results of all blocks, concatenated; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
