"""The IADA loss (Eq. 6) in tiles of rows × classes: nothing of size N×C is held.

For heads of many classes, with a diagonal Σ or none. Over the classes j ≠ y of each row the forward
pass adds up, tile by tile and relative to the largest logit so far, as attention does,

    λ = log Σ_j exp z̃_j ,   m = Σ_j exp(z̃_j − λ) w_j

which are both the loss and, without a second look at W, the gradients of the row; the backward pass
computes the logits of each tile again for the gradients of the head. With P = 1 − p_y = σ(λ − z̃_y)
and D_j = P exp(z̃_j − λ), D_y = −P, nothing cancels on confident samples:

    ℓ = log(1 + exp(λ − z̃_y))    ∂ℓ/∂h = P (m − w_y)    ∂ℓ/∂ε = s·∂ℓ/∂h    s = sign(m⁰ − w_y)

where m⁰ is m of the plain logits. A diagonal Σ is part of the products: but for a constant of the
row, z̃_j = w_j·u + w_j²·v + b_j + β log π_j with v = ½ α Σ_y and u = h + ε s − 2 v ∘ w_y. Centred on
their mean the rows w_j lose no common offset in the squares. A label that is no class makes its
loss NaN, and has no gradient.

Memory beside inputs and gradients: m − w_y of the features' size in the compute dtype, with ε a
byte more for each feature, and some tiles of at most 4 MiB, on a GPU 64 MiB, where smaller products
would not fill it. No host synchronisation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iada_kernels.contract import LossGradients, LossInputs, LossNeeds, LossOptions
from iada_kernels.torch_ops.blocking import blocks, join
from iada_kernels.torch_ops.reduction import mean_divisor, reduced

MOST_LOGITS = 2**24  # 64 MiB of float32: up to here all at once, which is a product less
MOST_CLASSES = 2**20  # in Triton's tiles of 32 or more: a grid of CUDA's has 65,535 along columns
NARROW = 1024  # features below this number make tiles no larger
SIDE = 4  # a tile's side on a GPU, times that on a CPU


class SavedRows(NamedTuple):
    """What the backward pass needs beside the inputs; (N) or (N, A) each."""

    target: Tensor  # the labels, 0 where ignored
    log_sum: Tensor  # λ
    wrong: Tensor  # P, 0 where ignored
    pull: Tensor | None  # m − w_y
    spread: Tensor | None  # Σ_j exp(z̃_j − λ) (w_j − w_y)²
    sign: Tensor | None  # s, int8
    divisor: Tensor | None  # for the mean: the number of rows not ignored


class Head(NamedTuple):
    """W as tiles read it: in the compute dtype and, for the squares, centred."""

    weight: Tensor
    centre: Tensor | None
    dtype: torch.dtype

    def rows(self, classes: Tensor | slice) -> Tensor:
        """w_j of these classes, (c, A)."""
        weight = self.weight[classes].to(self.dtype)
        return weight if self.centre is None else weight - self.centre


class Tilt(NamedTuple):
    """What a block of rows multiplies w_j and w_j² with, and their labels."""

    linear: Tensor  # u (n, A)
    square: Tensor | None  # v (n, A)
    target: Tensor  # (n)


def has_many_classes(inputs: LossInputs) -> bool:
    """Whether N×C or C is large, and larger than the features: then these passes serve.

    Not while torch.compile traces, which would write out every tile.
    """
    (count, width), num_classes = inputs.features.shape, len(inputs.weight)
    return (
        (count * num_classes > MOST_LOGITS or num_classes >= MOST_CLASSES)
        and num_classes > max(1, width)
        and not inputs.has_full_covariance
        and not inputs.has_low_rank_covariance
        and not torch.compiler.is_compiling()
    )


def loss_forward(
    inputs: LossInputs, options: LossOptions, needs: LossNeeds
) -> tuple[Tensor, SavedRows]:
    """The reduced loss and what `loss_backward` needs."""
    dtype, has_sigma = inputs.compute_dtype, inputs.covariance is not None
    labels, ignored = inputs.labels, inputs.labels == options.ignore_index
    # An index of −1 would be the last class.
    no_class = ~ignored & ((labels < 0) | (labels >= len(inputs.weight)))
    target = labels.masked_fill(ignored | no_class, 0)
    plain, bias = Head(inputs.weight, None, dtype), _offset(inputs, None)
    head, offset = _head(inputs), _offset(inputs, options.beta)
    needs_spread = has_sigma and needs.covariance
    needs_mean = needs.features or needs.epsilon or (has_sigma and (needs.weight or needs_spread))

    def of_features(needed: bool, dtype: torch.dtype) -> Tensor | None:
        size, device = inputs.features.shape, inputs.features.device
        return torch.empty(size, dtype=dtype, device=device) if needed else None

    pull, spread = of_features(needs_mean, dtype), of_features(needs_spread, dtype)
    signs = of_features(inputs.epsilon is not None, torch.int8)
    losses, log_sums, wrongs = [], [], []
    for rows in _tiles(inputs.features):
        y, sign = target[rows], None
        if signs is not None:
            unmoved = Tilt(inputs.features[rows].to(dtype), None, y)
            _, mean, _ = _sums_over_others(plain, unmoved, bias, needs_mean=True)
            sign = (mean - plain.rows(y)).sign_()
            signs[rows] = sign
        tilt = _tilt(inputs, options, head, rows, target, sign)
        label_weight = head.rows(y)
        label_logit = torch.linalg.vecdot(label_weight, tilt.linear)
        if tilt.square is not None:
            label_logit += torch.linalg.vecdot(label_weight.square(), tilt.square)
        if offset is not None:
            label_logit += offset[y]
        log_sum, mean, mean_square = _sums_over_others(head, tilt, offset, needs_mean, needs_spread)
        margin = log_sum - label_logit
        losses.append(-F.logsigmoid(-margin))
        wrongs.append(margin.sigmoid())
        log_sums.append(log_sum.masked_fill_(log_sum == -torch.inf, 0.0))
        if spread is not None:  # m of (w_j − w_y)²
            spread[rows] = mean_square + label_weight * (label_weight - 2 * mean)
        if pull is not None:
            pull[rows] = mean.sub_(label_weight)

    divisor = mean_divisor(ignored, options)
    wrong = join(wrongs).masked_fill_(ignored | no_class, 0.0)
    saved = SavedRows(target, join(log_sums), wrong, pull, spread, signs, divisor)
    loss = join(losses).masked_fill_(ignored, 0.0).masked_fill_(no_class, torch.nan)
    return reduced(loss, divisor, options), saved


def loss_backward(
    inputs: LossInputs, options: LossOptions, saved: SavedRows, grad_loss: Tensor, needs: LossNeeds
) -> LossGradients:
    """The gradients asked for: of features and weight in their dtype, others in the compute's."""
    if saved.divisor is not None:
        grad_loss = grad_loss / saved.divisor
    factor = saved.wrong * grad_loss
    grads = LossGradients()
    if needs.features and saved.pull is not None:
        grads.features = torch.empty_like(inputs.features)
        torch.mul(saved.pull, factor[:, None], out=grads.features)
    if needs.epsilon and saved.pull is not None and saved.sign is not None:
        pull, sign = saved.pull, saved.sign
        tiles = _tiles(pull)
        slopes = [torch.linalg.vecdot(pull[rows], sign[rows].to(pull.dtype)) for rows in tiles]
        grads.epsilon = join(slopes) * factor
    if needs.covariance and saved.spread is not None:
        rows = saved.spread * (0.5 * options.alpha * factor[:, None])
        zero = rows.new_zeros(inputs.weight.shape)
        grads.covariance = zero.index_add_(0, saved.target, rows)
    if needs.weight or needs.bias or needs.log_prior:
        grads.weight, sums = _head_gradients(inputs, options, saved, factor, needs.weight)
        grads.bias = sums if needs.bias else None
        grads.log_prior = sums * options.beta if needs.log_prior else None
    return grads


def _head_gradients(
    inputs: LossInputs, options: LossOptions, saved: SavedRows, factor: Tensor, needs_weight: bool
) -> tuple[Tensor | None, Tensor]:
    """∂L/∂W in the dtype of W, if needed, and Σ_i D_i (C); factor: P times the row's weight."""
    head, offset = _head(inputs), _offset(inputs, options.beta)
    grad_weight = torch.empty_like(inputs.weight) if needs_weight else None
    sums = factor.new_zeros(len(inputs.weight))
    for classes in _tiles(inputs.weight):
        weight = head.rows(classes)
        linear = torch.zeros_like(weight)
        square = torch.zeros_like(weight) if inputs.covariance is not None else None
        for rows in _tiles(inputs.features):
            sign = None if saved.sign is None else saved.sign[rows]
            tilt = _tilt(inputs, options, head, rows, saved.target, sign)
            d = _logits(weight, tilt, offset, classes).sub_(saved.log_sum[rows, None]).exp_()
            _fill_at_label(d, tilt.target, classes, -1.0)  # D, divided by P
            scale = factor[rows]
            sums[classes] += d.T @ scale
            if grad_weight is None:
                continue
            linear.addmm_(d.T, tilt.linear * scale[:, None])
            if square is not None and tilt.square is not None and saved.pull is not None:
                forms = tilt.square * (2 * scale[:, None])
                square.addmm_(d.T, forms)
                inside, local = _in_tile(tilt.target, classes)
                pull = (forms * saved.pull[rows]).masked_fill_(~inside[:, None], 0.0)
                linear.index_add_(0, local, pull, alpha=-1)
            del d  # before the next one is made
        if grad_weight is not None:
            grad_weight[classes] = linear if square is None else linear.addcmul_(weight, square)
    return grad_weight, sums


def _sums_over_others(
    head: Head, tilt: Tilt, offset: Tensor | None, needs_mean: bool, needs_square: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """λ (n), m (n, A) and m of w_j², (n, A), over the classes other than the label.

    m is left 0 where it is not needed.
    """
    log_sum = tilt.linear.new_full((len(tilt.target),), -torch.inf)
    top, total = log_sum, torch.zeros_like(log_sum)
    mean, mean_square = torch.zeros_like(tilt.linear), torch.zeros_like(tilt.linear)
    for classes in _tiles(head.weight):
        weight = head.rows(classes)
        z = _logits(weight, tilt, offset, classes)
        _fill_at_label(z, tilt.target, classes, -torch.inf)
        top, before = torch.maximum(top, z.amax(dim=1)), top
        base = top.masked_fill(top.isinf(), 0.0)
        kept = (before - base).exp_()
        z.sub_(base[:, None]).exp_()
        total = total * kept + z.sum(dim=1)
        log_sum = total.log() + base
        if needs_mean:
            mean.mul_(kept[:, None]).addmm_(z, weight)
        if needs_square:
            mean_square.mul_(kept[:, None]).addmm_(z, weight.square())
        del z  # before the next one is made
    total = torch.where(total > 0, total, 1.0)[:, None]
    return log_sum, mean.div_(total), mean_square.div_(total)


def _logits(weight: Tensor, tilt: Tilt, offset: Tensor | None, classes: slice) -> Tensor:
    """z̃ of a tile, (n, c), but for a constant of each row."""
    if offset is None:
        z = tilt.linear @ weight.T
    else:
        z = torch.addmm(offset[classes], tilt.linear, weight.T)
    return z if tilt.square is None else z.addmm_(tilt.square, weight.square().T)


def _in_tile(target: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Whether the label is among these classes, (n), and its column there, 0 if not."""
    inside = (target >= classes.start) & (target < classes.stop)
    return inside, (target - classes.start).masked_fill_(~inside, 0)


def _fill_at_label(tile: Tensor, target: Tensor, classes: slice, value: float) -> None:
    """Write `value` into the column of each row's label, where it is in this tile (n, c)."""
    inside, column = _in_tile(target, classes)
    column = column[:, None]
    tile.scatter_(1, column, tile.gather(1, column).masked_fill_(inside[:, None], value))


def _tilt(
    inputs: LossInputs,
    options: LossOptions,
    head: Head,
    rows: slice,
    target: Tensor,
    sign: Tensor | None,
) -> Tilt:
    linear, target = inputs.features[rows].to(head.dtype), target[rows]
    if sign is not None and inputs.epsilon is not None:
        epsilon = inputs.epsilon[rows, None].to(head.dtype)
        linear = torch.addcmul(linear, epsilon, sign.to(head.dtype))
    if inputs.covariance is None:
        return Tilt(linear, None, target)
    square = inputs.covariance[target].to(head.dtype) * (0.5 * options.alpha)
    return Tilt(linear - 2 * square * head.rows(target), square, target)


def _head(inputs: LossInputs) -> Head:
    """Centred for a Σ, on the mean that is taken without a copy of W in another dtype."""
    weight, dtype, centre = inputs.weight, inputs.compute_dtype, None
    if inputs.covariance is not None:
        centre = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
        for classes in _tiles(weight):
            centre += weight[classes].to(dtype).sum(dim=0)
        centre /= len(weight)
    return Head(weight, centre, dtype)


def _offset(inputs: LossInputs, beta: float | None) -> Tensor | None:
    """b + β log π, (C), or b where beta is None; None for 0."""
    bias, log_prior, dtype = inputs.bias, inputs.log_prior, inputs.compute_dtype
    if bias is not None:
        bias = bias.to(dtype)
    if log_prior is None or beta is None:
        return bias
    prior = beta * log_prior.to(dtype)
    return prior if bias is None else prior + bias


def _tiles(matrix: Tensor) -> Iterator[slice]:
    """Blocks of rows (…, A) or of classes, of one size for both sides of a tile."""
    side = 1 if matrix.device.type == "cpu" else SIDE
    count, width = matrix.shape
    return blocks(count, max(side * NARROW, width) // side**2)
