"""The backward pass of the single-launch loss: parts of `single_launch`, added up and scaled.

    ∂h, ∂ε    g · part at the rows that have a class, 0 elsewhere
    ∂W, ∂b    g · Σ_c part_c over the classes that have rows
    ∂log π    β ∂b
    ∂Σ_c      g · part_c, 0 for classes without rows

with g the gradient of the loss. One launch; its programs are dealt out to ∂W, ∂b, rows and ∂Σ in
this order. Nothing that was saved is changed, so that it can be used again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import LossGradients, LossInputs, LossNeeds, LossOptions
from iada_kernels.triton.device import load_labels, number
from iada_kernels.triton.launch import compute_type, current_configuration, launch, split
from iada_kernels.triton.single_launch import SavedParts


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
    grad_loss, labels, size,
    part_features, part_weight, part_sums, part_covariance, part_epsilon,
    features, weight, bias, log_prior, covariance, epsilon,
    beta, beta_low, weight_programs, bias_programs, row_programs, N, C, A, ignore_index,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    g = tl.load(grad_loss).to(ACC)
    if weight is not None:
        at = program * BLOCK + tl.arange(0, BLOCK)
        if program < weight_programs:
            total = g * _sum_partials(part_weight, size, at, C * A, C, BLOCK_C, BLOCK)
            tl.store(weight + at, total, mask=at < C * A)
    program -= weight_programs
    if part_sums is not None:  # for ∂b and ∂log π
        at = program * BLOCK + tl.arange(0, BLOCK)
        if (program >= 0) & (program < bias_programs):
            total = g * _sum_partials(part_sums, size, at, C, C, BLOCK_C, BLOCK)
            if bias is not None:
                tl.store(bias + at, total, mask=at < C)
            if log_prior is not None:
                tl.store(log_prior + at, number(beta, beta_low, ACC) * total, mask=at < C)
    program -= bias_programs
    if (program >= 0) & (program < row_programs):
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        y, _ = load_labels(labels, rows, rows < N, ignore_index, C)
        if epsilon is not None:
            part = tl.load(part_epsilon + rows, mask=y >= 0, other=0.0)
            tl.store(epsilon + rows, g * part, mask=rows < N)
        if features is not None:
            offs_a = tl.arange(0, BLOCK_A)
            offs, col_mask = rows[:, None] * A + offs_a[None, :], (offs_a < A)[None, :]
            part = tl.load(part_features + offs, mask=(y >= 0)[:, None] & col_mask, other=0.0)
            grad = (g * part).to(features.dtype.element_ty)
            tl.store(features + offs, grad, mask=(rows < N)[:, None] & col_mask)
    program -= row_programs
    if covariance is not None:
        start = program * A * A
        if program >= 0:
            written = tl.where(tl.load(size + program) > 0, A * A, 0)
            for first in range(0, A * A, BLOCK_N * BLOCK_A):
                entry = first + tl.arange(0, BLOCK_N * BLOCK_A)  # `at` has another shape above
                part = tl.load(part_covariance + start + entry, mask=entry < written, other=0.0)
                tl.store(covariance + start + entry, g * part, mask=entry < A * A)


def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedParts,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype, others in the compute dtype."""
    num_classes, width = inputs.weight.shape
    count, dtype = len(inputs.labels), inputs.compute_dtype

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
    tile, block_a = (
        current_configuration(grad_loss.device).single_launch,
        triton.next_power_of_2(width),
    )
    block_n = max(1, 1024 // block_a)
    programs = (
        triton.cdiv(num_classes * width, tile.columns) if needs.weight else 0,
        triton.cdiv(num_classes, tile.columns) if needs.bias or needs.log_prior else 0,
        triton.cdiv(count, block_n) if needs.features or needs.epsilon else 0,
    )
    launch(
        single_launch_backward_kernel,
        (sum(programs) + num_classes * needs.covariance,),
        grad_loss, inputs.labels.contiguous(), saved.size,
        saved.features, saved.weight, saved.sums if programs[1] else None,
        saved.covariance, saved.epsilon,
        grads.features, grads.weight, grads.bias, grads.log_prior, grads.covariance, grads.epsilon,
        *split(options.beta), *programs, count, num_classes, width, options.ignore_index,
        BLOCK_N=block_n, BLOCK_C=32, BLOCK=tile.columns, BLOCK_A=block_a,
        ACC=compute_type(dtype),
    )  # fmt: skip
    return grads
