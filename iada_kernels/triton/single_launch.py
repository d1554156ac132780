"""The single-launch loss, for heads so small that W and Σ_c fit in one program.

One program for each class c does everything for the rows i with y_i = c:

    rows    found by scanning the labels
    stream  Σ_c, μ_c, n_c ← the streaming update                                     (if asked)
    forms   P = (W − 1 w_cᵀ) ½(Σ_c + Σ_cᵀ),   R_j = ½ P_j · (w_j − w_c)
    rows    z = h Wᵀ + b,   s = sign(Σ_{j≠c} r_j w_j − w_c),   T = s Wᵀ
            z̃ = z + ε T + α R + β log π,   ℓ,   D = softmax(z̃) − onehot(c)
            ∂h = D W,   ∂ε = Σ_j D_j T_j,   G += D,   ∂W += Dᵀ (h + ε s)
    class   ∂W += α [G∘P − e_c Gᵀ P],   ∂Σ_c = ½ α Σ_j G_j (w_j − w_c)(w_j − w_c)ᵀ

Symbols and conventions as in `head`, `moments` and `class_pass`. Gradients are those of the reduced
loss; `single_launch_backward` adds the parts of the classes and multiplies by the gradient of the
loss. The program that finishes last adds the losses of the classes, in their order.

features (N, A) · weight (C, A) · covariance (C, A, A) · Parts, written for classes that have rows:
∂h (N, A) and ∂ε (N) at their rows, ∂W (C, C, A), G (C, C), ∂Σ (C, A, A).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import ClassStatistics, LossInputs, LossNeeds, LossOptions
from iada_kernels.triton.class_loss import (
    Blocks,
    Head,
    SavedParts,
    Scratch,
    Statistics,
    Terms,
    class_loss,
)
from iada_kernels.triton.config import SingleLaunchLimits, next_power_of_2
from iada_kernels.triton.device import wait_for_memory
from iada_kernels.triton.launch import current_configuration, launch, split
from iada_kernels.triton.records import Labels, Samples, Sizes, as_operand, sign_dtype
from iada_kernels.triton.rows import scan_rows


@triton.jit
def single_launch_kernel(
    samples, head, labels, terms, statistics, scratch, parts, loss, sizes,
    MEAN: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, _ = sizes
    c = tl.program_id(0)
    first, m, num_valid, num_invalid = scan_rows(labels, scratch.order, c, N, C, B.N)
    wait_for_memory()
    tl.debug_barrier()  # other threads read what was stored to `order`
    inv_count = tl.cast(1.0, ACC)
    if MEAN:
        inv_count /= tl.maximum(num_valid, 1)
    total = tl.cast(0.0, ACC)
    if m > 0:
        total = class_loss(
            samples, scratch.order + first, m, head, terms, statistics, scratch, parts, c,
            inv_count, sizes, B, ACC, DOT,
        )  # fmt: skip
    tl.store(parts.size + c, m)
    tl.store(scratch.losses + c, total)
    wait_for_memory()
    tl.debug_barrier()
    if tl.atomic_add(scratch.arrived, 1, sem="acq_rel") == C - 1:
        j = tl.arange(0, B.C)
        every = tl.load(scratch.losses + j, mask=j < C, other=0.0, cache_modifier=".cg")
        result = tl.sum(every, axis=0) * inv_count
        tl.store(loss, tl.where(num_invalid > 0, float("nan"), result))


def is_supported(inputs: LossInputs, options: LossOptions, stream: ClassStatistics | None) -> bool:
    """Whether one launch serves: sizes within the configuration, Σ full and where it lies."""
    limit = current_configuration(inputs.features.device).single_launch
    num_classes, width = inputs.weight.shape
    if (
        options.reduction == "none"
        or len(inputs.labels) > limit.rows
        or num_classes > limit.classes
        or width > limit.width
    ):
        return False
    dtype, sigma = inputs.compute_dtype, inputs.covariance
    # Where A is no multiple of 16, addresses take registers.
    tile_bytes = limit.tile_bytes if width % 16 == 0 else limit.odd_tile_bytes
    size = _padded(num_classes) * _padded(width) * dtype.itemsize
    if size > tile_bytes or (dtype == torch.float64 and not limit.float64):
        return False
    if sigma is None:
        return True
    state = [sigma] if stream is None else [sigma, stream.mean]
    return (
        sigma.dim() == 3
        and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in state)
        and (stream is None or stream.count.is_contiguous())
    )


def loss_forward(
    inputs: LossInputs, options: LossOptions, needs: LossNeeds, stream: ClassStatistics | None
) -> tuple[Tensor, SavedParts]:
    """The reduced loss and the parts of its gradients, where `is_supported`; one launch.

    `stream` and `inputs.covariance` are updated in place.
    """
    vectors = (inputs.bias, inputs.epsilon, inputs.log_prior)
    bias, epsilon, log_prior = (None if v is None else v.contiguous() for v in vectors)
    sizes, dtype = Sizes.of(inputs), inputs.compute_dtype
    features, weight = (as_operand(each, dtype) for each in (inputs.features, inputs.weight))
    count, num_classes, width = sizes

    def fresh(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)

    parts = SavedParts(
        size=fresh(num_classes, dtype=torch.int32),
        sums=fresh(num_classes, num_classes),
        features=fresh(count, width) if needs.features else None,
        weight=fresh(num_classes, num_classes, width) if needs.weight else None,
        covariance=fresh(num_classes, width, width) if needs.covariance else None,
        epsilon=fresh(count) if needs.epsilon else None,
    )
    sign = None if epsilon is None else fresh(count, width, dtype=sign_dtype(dtype))
    keeps_residual = sign is not None or needs.features or needs.weight
    scratch = Scratch(
        order=fresh(count, dtype=torch.int32),
        residual=fresh(count, num_classes) if keeps_residual else None,
        losses=fresh(num_classes),
        arrived=torch.zeros(1, dtype=torch.int32, device=weight.device),
    )
    loss, limits = fresh(), current_configuration(weight.device).single_launch
    launch(
        single_launch_kernel, (num_classes,),
        Samples(features, features.stride(0), epsilon, sign), Head(weight, weight.stride(0), bias),
        Labels.of(inputs, options),
        Terms(inputs.covariance, split(options.alpha), log_prior, split(options.beta)),
        None if stream is None else Statistics(stream.mean, stream.count),
        scratch, parts, loss, sizes,
        like=loss, tile=limits,
        MEAN=options.reduction == "mean", B=_blocks(limits, int(num_classes), int(width)),
    )  # fmt: skip
    return loss, parts


@functools.cache
def _blocks(limits: SingleLaunchLimits, num_classes: int, width: int) -> Blocks:
    block_c, block_a = _padded(num_classes), _padded(width)
    sizes = (
        limits.group,
        min(64, max(16, limits.block_elements // block_c)),
        min(limits.class_step, block_c),
        block_c,
        block_a,
        min(limits.step, block_c, block_a),
    )
    return Blocks(*map(tl.constexpr, sizes))  # as plain int they cannot be shapes in Triton 3.6


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))
