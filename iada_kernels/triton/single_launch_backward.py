"""The backward pass of the single-launch loss: parts of `single_launch`, added up and scaled.

    ∂h, ∂ε    g · part at the rows that have a class, 0 elsewhere
    ∂W, ∂b    g · Σ_c part_c over the classes that have rows
    ∂log π    β ∂b
    ∂Σ_c      g · part_c, 0 for classes without rows

with g the gradient of the loss. One launch; its programs are dealt out to ∂W, ∂b, rows and ∂Σ in
this order. Nothing that was saved is changed, so that it can be used again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossGradients, LossInputs, LossNeeds, LossOptions
from iada_kernels.triton.class_loss import SavedParts
from iada_kernels.triton.config import cdiv, next_power_of_2
from iada_kernels.triton.device import load_labels, number
from iada_kernels.triton.launch import current_configuration, launch, split
from iada_kernels.triton.records import Labels, Sizes


class Gradients(NamedTuple):
    """`LossGradients` as the kernel writes them."""

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    covariance: Tensor | None
    epsilon: Tensor | None
    log_prior: Tensor | None


class Programs(NamedTuple):
    """How many programs serve ∂W, ∂b and ∂log π, the rows."""

    weight: int
    bias: int
    rows: int


@triton.jit
def _sum_partials(parts, size, at, length, C, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Σ_c parts[c, at] over the classes that have rows; parts (C, length)."""
    total = tl.zeros([BLOCK], dtype=parts.dtype.element_ty)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        present = tl.load(size + c, mask=c < C, other=0) > 0
        mask = present[:, None] & (at < length)[None, :]
        total += tl.sum(
            tl.load(parts + c[:, None] * length + at[None, :], mask=mask, other=0.0), axis=0
        )
    return total


@triton.jit
def single_launch_backward_kernel(
    grad_loss, labels, parts, grads, beta, programs, sizes,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    program = tl.program_id(0)
    g = tl.load(grad_loss).to(ACC)
    if grads.weight is not None:
        at = program * BLOCK + tl.arange(0, BLOCK)
        if program < programs.weight:
            total = g * _sum_partials(parts.weight, parts.size, at, C * A, C, BLOCK_C, BLOCK)
            tl.store(grads.weight + at, total, mask=at < C * A)
    program -= programs.weight
    if (grads.bias is not None) or (grads.log_prior is not None):
        at = program * BLOCK + tl.arange(0, BLOCK)
        if (program >= 0) & (program < programs.bias):
            total = g * _sum_partials(parts.sums, parts.size, at, C, C, BLOCK_C, BLOCK)
            if grads.bias is not None:
                tl.store(grads.bias + at, total, mask=at < C)
            if grads.log_prior is not None:
                tl.store(grads.log_prior + at, number(beta, ACC) * total, mask=at < C)
    program -= programs.bias
    if (program >= 0) & (program < programs.rows):
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        y, _ = load_labels(labels, rows, rows < N, C)
        if grads.epsilon is not None:
            part = tl.load(parts.epsilon + rows, mask=y >= 0, other=0.0)
            tl.store(grads.epsilon + rows, g * part, mask=rows < N)
        if grads.features is not None:
            offs_a = tl.arange(0, BLOCK_A)
            offs, col_mask = rows[:, None] * A + offs_a[None, :], (offs_a < A)[None, :]
            part = tl.load(parts.features + offs, mask=(y >= 0)[:, None] & col_mask, other=0.0)
            grad = (g * part).to(grads.features.dtype.element_ty)
            tl.store(grads.features + offs, grad, mask=(rows < N)[:, None] & col_mask)
    program -= programs.rows
    if grads.covariance is not None:
        start = program * A * A
        if program >= 0:
            written = tl.where(tl.load(parts.size + program) > 0, A * A, 0)
            for first in range(0, A * A, BLOCK_N * BLOCK_A):
                entry = first + tl.arange(0, BLOCK_N * BLOCK_A)  # `at` has another shape above
                part = tl.load(parts.covariance + start + entry, mask=entry < written, other=0.0)
                tl.store(grads.covariance + start + entry, g * part, mask=entry < A * A)


def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedParts,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype, others in the compute dtype."""
    sizes, dtype = Sizes.of(inputs), inputs.compute_dtype
    count, num_classes, width = sizes

    def result(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=grad_loss.device) if wanted else None

    grads = LossGradients(
        features=result(needs.features, count, width, dtype=inputs.features.dtype),
        weight=result(needs.weight, num_classes, width),
        bias=result(needs.bias, num_classes),
        covariance=result(needs.covariance, num_classes, width, width),
        epsilon=result(needs.epsilon, count),
        log_prior=result(needs.log_prior, num_classes),
    )
    columns = current_configuration(grad_loss.device).single_launch.columns
    block_a = next_power_of_2(width)
    block_n = max(1, 1024 // block_a)
    programs = Programs(
        weight=cdiv(num_classes * width, columns) if needs.weight else 0,
        bias=cdiv(num_classes, columns) if needs.bias or needs.log_prior else 0,
        rows=cdiv(count, block_n) if needs.features or needs.epsilon else 0,
    )
    classes = num_classes if needs.covariance else 0
    launch(
        single_launch_backward_kernel, (sum(programs) + classes,),
        grad_loss, Labels.of(inputs, options), saved, Gradients(*grads.tensors()),
        split(options.beta), programs, sizes,
        like=saved.sums, BLOCK_N=block_n, BLOCK_C=32, BLOCK=columns, BLOCK_A=block_a,
    )  # fmt: skip
    return grads
