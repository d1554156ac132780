"""The rows of each class, found by scanning the labels: no sort, no atomics, no host.

    size[c]  = m, the rows of class c            start[c] = the rows of classes before c
    order[start[c] : start[c] + m]               these rows, ascending
    batch_weight[c] = m/(n + m), n ← n + m       where a streaming covariance is updated

labels (N) int64 · start, size (C) int32 · order (N) int32 · batch_weight (C) · count n (C) int64.
A label outside [0, C), or equal to ignore_index, belongs to no class.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import load_labels
from iada_kernels.triton.launch import compute_type, current_configuration, launch


@triton.jit
def scan_rows(labels, order, c, N, C, ignore_index, BLOCK: tl.constexpr):
    """start and size of class c, whose `order` is stored; the numbers of valid and invalid labels.

    Threads that read `order` again wait for each other first.
    """
    before, counted, num_invalid = 0, 0, 0
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        y, invalid_label = load_labels(labels, rows, rows < N, ignore_index, C)
        before += tl.sum(((y >= 0) & (y < c)).to(tl.int32), axis=0)
        counted += tl.sum(((y >= 0) | invalid_label).to(tl.int32), axis=0)
        num_invalid += tl.sum(invalid_label.to(tl.int32), axis=0)
    position = before
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        y, _ = load_labels(labels, rows, rows < N, ignore_index, C)
        same_class = (y == c).to(tl.int32)
        tl.store(order + position + tl.cumsum(same_class, axis=0) - 1, rows, mask=same_class != 0)
        position += tl.sum(same_class, axis=0)
    return before, position - before, counted, num_invalid


@triton.jit
def group_rows_kernel(
    labels, start, size, order, batch_weight, count, N, C, ignore_index,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    before, m, _, _ = scan_rows(labels, order, c, N, C, ignore_index, BLOCK)
    tl.store(start + c, before)
    tl.store(size + c, m)
    if count is not None:
        n = tl.load(count + c)
        tl.store(batch_weight + c, tl.cast(m, ACC) / tl.cast(tl.maximum(n + m, 1), ACC))
        tl.store(count + c, n + m)


class Groups(NamedTuple):
    """start, size (C) and order (N) int32; batch_weight (C) of a streaming update, else None."""

    start: Tensor
    size: Tensor
    order: Tensor
    batch_weight: Tensor | None


def group_rows(
    labels: Tensor, num_classes: int, ignore_index: int, count: Tensor | None, dtype: torch.dtype
) -> Groups:
    """One launch; `count` is updated in place."""
    start = labels.new_empty(num_classes, dtype=torch.int32)
    size, order = torch.empty_like(start), labels.new_empty(len(labels), dtype=torch.int32)
    batch_weight = None if count is None else labels.new_empty(num_classes, dtype=dtype)
    launch(
        group_rows_kernel,
        (num_classes,),
        labels, start, size, order, batch_weight, count, len(labels), num_classes, ignore_index,
        BLOCK=current_configuration(labels.device).group,
        ACC=compute_type(dtype),
    )  # fmt: skip
    return Groups(start, size, order, batch_weight)
