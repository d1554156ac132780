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
from iada_kernels.triton.records import Labels


@triton.jit
def scan_rows(labels, order, c, N, C, BLOCK: tl.constexpr):
    """start and size of class c, whose `order` is stored; the numbers of valid and invalid labels.

    Threads that read `order` again wait for each other first.
    """
    before, counted, num_invalid = 0, 0, 0
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        y, invalid_label = load_labels(labels, rows, rows < N, C)
        before += tl.sum(((y >= 0) & (y < c)).to(tl.int32), axis=0)
        counted += tl.sum(((y >= 0) | invalid_label).to(tl.int32), axis=0)
        num_invalid += tl.sum(invalid_label.to(tl.int32), axis=0)
    position = before
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        y, _ = load_labels(labels, rows, rows < N, C)
        same_class = (y == c).to(tl.int32)
        tl.store(order + position + tl.cumsum(same_class, axis=0) - 1, rows, mask=same_class != 0)
        position += tl.sum(same_class, axis=0)
    return before, position - before, counted, num_invalid


class Groups(NamedTuple):
    """start, size (C) and order (N) int32."""

    start: Tensor
    size: Tensor
    order: Tensor

    @classmethod
    def empty(cls, labels: Labels, num_classes: int) -> "Groups":
        """For `group_class` to fill."""
        start = labels.classes.new_empty(num_classes, dtype=torch.int32)
        return cls(start, torch.empty_like(start), start.new_empty(labels.classes.numel()))


@triton.jit
def group_class(
    labels, groups, count, batch_weight, c, N, C, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The rows of class c; with a `count`, its update in place and the weight of the batch."""
    before, m, _, _ = scan_rows(labels, groups.order, c, N, C, BLOCK)
    tl.store(groups.start + c, before)
    tl.store(groups.size + c, m)
    if count is not None:
        n = tl.load(count + c)
        tl.store(batch_weight + c, tl.cast(m, ACC) / tl.cast(tl.maximum(n + m, 1), ACC))
        tl.store(count + c, n + m)
