"""The forward pass for any N, C and A, in four launches for a full Σ.

    rows and logits    the rows of each class            and  z = h Wᵀ + b
    moments and sign   class means, μ, variances σ       and  s
    class pass         a full Σ, updated, and its table R
    logits             z̃, D in its place and the loss

The programs of the first two are dealt out, first to the classes, then to the head: Σ alone needs
the one, ε alone the other, and what is not needed has no programs. Without either, both launches
fall away, and without a full Σ the class pass.

Programs of later launches count their arrivals, in `arrived` (C + 1 + tiles of rows) int32: for
each class those of its pass, for the loss the tiles of rows, for each tile of rows its tiles of
classes. The first launch sets these counters to 0, so that nothing is kept between steps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iada_kernels.contract import ClassStatistics, LossInputs, LossOptions
from iada_kernels.layout import contiguous_as
from iada_kernels.triton.class_pass import HeadWeight, stream_and_table
from iada_kernels.triton.config import cdiv
from iada_kernels.triton.device import set_to_zero
from iada_kernels.triton.head import (
    head_loss,
    logits_tile,
    logits_tile_of,
    sign_tile,
    store_logits,
)
from iada_kernels.triton.launch import current_configuration, launch
from iada_kernels.triton.moments import Moments, update_class
from iada_kernels.triton.records import Labels, Samples, Sizes, sign_dtype
from iada_kernels.triton.rows import Groups, group_class


class Forward(NamedTuple):
    """What later passes need."""

    residual: Tensor  # D (N, C)
    sign: Tensor | None  # s (N, A)
    loss: Tensor  # (N) or ()
    inv_count: Tensor | None  # (1), 1/n for the mean, 1 for the sum
    groups: Groups | None
    table_tangent: Tensor | None  # Ṙ (C, C)


@triton.jit
def rows_and_logits_kernel(
    samples, labels, groups, count, batch_weight, weight, bias, z, arrived, num_arrived, sizes,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, _ = sizes
    program = tl.program_id(0)
    if arrived is not None:
        if program == 0:
            set_to_zero(arrived, num_arrived)
    if groups is not None:
        if program < C:
            group_class(labels, groups, count, batch_weight, program, N, C, BLOCK, ACC)
        program -= C
    if z is not None:
        if program >= 0:
            rows = tl.cdiv(N, BLOCK_N)
            row, column = program % rows, program // rows
            total = logits_tile(
                samples, weight, bias, labels, None, None, None, None, None, row, column, sizes,
                BLOCK_N, BLOCK_C, BLOCK_A, ACC, DOT,
            )  # fmt: skip
            store_logits(z, total, row, column, sizes, BLOCK_N, BLOCK_C)


@triton.jit
def moments_and_sign_kernel(
    samples, labels, groups, moments, covariance, weight, z, sign, sizes,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N, C, A = sizes
    program = tl.program_id(0)
    if moments is not None:
        count = C * tl.cdiv(A, COLUMNS)
        if program < count:
            update_class(
                samples, groups, moments, covariance, program % C, program // C, A,
                BLOCK_M, COLUMNS, ACC,
            )  # fmt: skip
        program -= count
    if sign is not None:
        if program >= 0:
            rows = tl.cdiv(N, BLOCK_N)
            sign_tile(
                z, weight, labels, sign, program % rows, program // rows, sizes,
                BLOCK_N, BLOCK_A, BLOCK_C, ACC, DOT,
            )  # fmt: skip


class Dealt(NamedTuple):
    """What the first two launches read and fill; None for what is not needed."""

    samples: Samples
    labels: Labels
    sizes: Sizes
    groups: Groups | None = None
    moments: Moments | None = None
    weight: Tensor | None = None  # with it z, and s where there is an ε
    z: Tensor | None = None  # (N, C)
    sign: Tensor | None = None  # (N, A)


def rows_and_logits(
    dealt: Dealt,
    like: Tensor,
    count: Tensor | None,
    bias: Tensor | None = None,
    arrived: Tensor | None = None,
) -> None:
    """Groups, and the first logits if there is a sign; `count` in place, `arrived` becomes 0."""
    configuration = current_configuration(like.device)
    tile, sizes, moments = configuration.logits, dealt.sizes, dealt.moments
    programs = 0 if dealt.groups is None else sizes.C
    has_logits = dealt.sign is not None
    if has_logits:
        rows, columns = tile.grid(sizes.N, sizes.C)
        programs += rows * columns
    launch(
        rows_and_logits_kernel, (programs,),
        dealt.samples, dealt.labels, dealt.groups, count,
        None if moments is None else moments.batch_weight,
        *((dealt.weight, bias, dealt.z) if has_logits else (None, None, None)),
        arrived, 0 if arrived is None else arrived.numel(), sizes,
        like=like, tile=tile, BLOCK=configuration.group,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_A=tile.depth,
    )  # fmt: skip


def moments_and_sign(dealt: Dealt, like: Tensor, covariance: Tensor | None) -> None:
    """μ in place, and variances (C, A) if given, where there are `moments`; s where it is given."""
    configuration = current_configuration(like.device)
    tile, moments_tile, sizes = configuration.sign, configuration.moments, dealt.sizes
    programs = 0 if dealt.moments is None else sizes.C * cdiv(sizes.A, moments_tile.columns)
    if dealt.sign is not None:
        rows, columns = tile.grid(sizes.N, sizes.A)
        programs += rows * columns
    launch(
        moments_and_sign_kernel, (programs,),
        dealt.samples, dealt.labels, dealt.groups, dealt.moments, covariance,
        *((None,) * 3 if dealt.sign is None else (dealt.weight, dealt.z, dealt.sign)), sizes,
        like=like, tile=tile, BLOCK_M=moments_tile.rows, COLUMNS=moments_tile.columns,
        BLOCK_N=tile.rows, BLOCK_A=tile.columns, BLOCK_C=tile.depth,
    )  # fmt: skip


def forward(
    inputs: LossInputs,
    options: LossOptions,
    needs_rows: bool,
    stream: ClassStatistics | None = None,
    tangent: Tensor | None = None,
) -> Forward:
    """The loss and D. A `stream`, of the compute dtype as Σ then is, is updated first.

    needs_rows: whether `groups` are asked for, where neither a full Σ nor a stream needs them. With
    `tangent`, V (C, A) in the compute dtype, Ṙ of a full Σ too.
    """
    sigma, dtype, full = inputs.covariance, inputs.compute_dtype, inputs.has_full_covariance
    weight, bias = contiguous_as(inputs.weight, dtype), contiguous_as(inputs.bias, dtype)
    samples, labels, sizes = (
        Samples.plain(inputs.features, dtype), Labels.of(inputs, options), Sizes.of(inputs)
    )  # fmt: skip
    groups = moments = count = sign = table = table_tangent = None
    if needs_rows or full or stream is not None:
        groups = Groups.empty(labels, sizes.C)
    if stream is not None:
        moments, count = Moments.of(stream.mean), stream.count
    z = weight.new_empty(sizes.N, sizes.C)
    if inputs.epsilon is not None:
        sign = weight.new_empty(inputs.features.shape, dtype=sign_dtype(dtype))
    dealt = Dealt(samples, labels, sizes, groups, moments, weight, z, sign)

    row_tiles = cdiv(sizes.N, logits_tile_of(current_configuration(weight.device), inputs).rows)
    is_first = groups is None and sign is None  # the logits, then: nothing sets the counters to 0
    arrived = (torch.zeros if is_first else torch.empty)(
        sizes.C + 1 + row_tiles, dtype=torch.int32, device=weight.device
    )
    rows_and_logits(dealt, weight, count, bias, arrived)
    moments_and_sign(dealt, weight, None if full or stream is None else sigma)
    if full and sigma is not None and groups is not None:
        table, table_tangent = stream_and_table(
            contiguous_as(sigma, dtype), HeadWeight(weight, tangent), groups,
            None if moments is None else samples, moments, arrived,
        )  # fmt: skip
    if sign is not None:
        samples = samples._replace(epsilon=contiguous_as(inputs.epsilon, dtype), sign=sign)
    loss, inv_count = head_loss(z, inputs, options, weight, bias, samples, labels, table, arrived)
    return Forward(z, sign, loss, inv_count, groups, table_tangent)
