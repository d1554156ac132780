"""The rows of each class, found by scanning the labels: no sort, no atomics, no host.

    size[c]  = m, the rows of class c            start[c] = the rows of classes before c
    order[start[c] : start[c] + m]               these rows, ascending
    batch_weight[c] = m/(n + m), n ← n + m       where a streaming covariance is updated
    arrived[c] = 0                               where a pass over Σ will count its programs

labels (N) int64 · start, size, arrived (C) int32 · order (N) int32 · batch_weight (C) ·
count n (C) int64.
A label outside [0, C), or equal to ignore_index, belongs to no class.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.triton.device import load_labels
from iada_kernels.triton.launch import current_configuration, launch
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
    """start, size (C) and order (N) int32; batch_weight (C) of a streaming update, else None."""

    start: Tensor
    size: Tensor
    order: Tensor
    batch_weight: Tensor | None


@triton.jit
def group_rows_kernel(
    labels, groups, count, arrived, N, C, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0)
    before, m, _, _ = scan_rows(labels, groups.order, c, N, C, BLOCK)
    tl.store(groups.start + c, before)
    tl.store(groups.size + c, m)
    if count is not None:
        n = tl.load(count + c)
        tl.store(groups.batch_weight + c, tl.cast(m, ACC) / tl.cast(tl.maximum(n + m, 1), ACC))
        tl.store(count + c, n + m)
    if arrived is not None:
        tl.store(arrived + c, 0)


def group_rows(
    labels: Labels, count: Tensor | None, like: Tensor, arrived: Tensor | None = None
) -> Groups:
    """One launch; `count` is updated in place, `arrived` set to 0.

    `like` is (C, A) in the compute dtype.
    """
    num_rows, num_classes = len(labels.classes), len(like)
    start = labels.classes.new_empty(num_classes, dtype=torch.int32)
    size, order = torch.empty_like(start), start.new_empty(num_rows)
    groups = Groups(start, size, order, None if count is None else like.new_empty(num_classes))
    block = current_configuration(like.device).group
    launch(
        group_rows_kernel, (num_classes,),
        labels, groups, count, arrived, num_rows, num_classes, like=like, BLOCK=block,
    )  # fmt: skip
    return groups
