"""The IADA loss and its gradients by Triton kernels, for any N, C and A.

Launches of this package, for a full Σ and ε given (some sums over shares add one of torch's):
    update    2  rows of each class, moments; the rest is part of the class pass
    forward   6  first logits, sign, class pass (and its sum), logits, softmax, reduce
    backward  4  class sums, shares of the class pass, features, weight
Where W and Σ_c fit in one program: update and forward 1, backward 1 (`small`, `small_backward`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels.contract import (
    ClassStatistics,
    LossGradients,
    LossInputs,
    LossNeeds,
    LossOptions,
)
from iada_kernels.triton import small, small_backward
from iada_kernels.triton.class_pass import add_pair_terms, stream_and_table
from iada_kernels.triton.class_pass_backward import class_sums, weight_shares
from iada_kernels.triton.head import adjusted_logits, reduce_losses
from iada_kernels.triton.head_backward import grad_features, grad_variances, grad_weight
from iada_kernels.triton.launch import by_rows
from iada_kernels.triton.moments import update_moments
from iada_kernels.triton.rows import Groups, group_rows
from iada_kernels.triton.small import SavedParts


class SavedLoss(NamedTuple):
    """D (N, C), s (N, A) int8, the factor of the mean (1), and the rows of each class."""

    residual: Tensor
    sign: Tensor | None
    inverse: Tensor | None
    groups: Groups | None


def loss_forward(
    inputs: LossInputs,
    options: LossOptions,
    needs: LossNeeds,
    stream: ClassStatistics | None = None,
) -> tuple[Tensor, SavedLoss | SavedParts]:
    """The reduced loss and what `loss_backward` needs; the batch first goes into a `stream`."""
    sigma = inputs.covariance
    if small.fits(inputs, options, stream):
        found = small.loss_forward(inputs, options, needs, stream)
        if stream is not None and sigma is not None:
            _changed(sigma, stream.mean, stream.count)
        return found
    weight = inputs.weight.to(inputs.compute_dtype).contiguous()
    labels = inputs.labels.contiguous()
    full = sigma is not None and sigma.dim() == 3
    if stream is not None and not _in_place(inputs, stream, weight.dtype):
        assert sigma is not None
        counted = torch.where(labels == options.ignore_index, -1, labels)
        covariance_update(sigma, stream.mean, stream.count, inputs.features, counted)
        stream = None
    groups = moments = table = None
    if full or stream is not None or needs.covariance:
        count = None if stream is None else stream.count
        groups = group_rows(labels, len(weight), options.ignore_index, count, weight.dtype)
    features = by_rows(inputs.features)
    if stream is not None and groups is not None:
        moments = update_moments(features, groups, stream.mean, None if full else sigma)
    if full and sigma is not None and groups is not None:
        plain = sigma.to(weight.dtype).contiguous()
        table, _ = stream_and_table(plain, weight, groups, features, moments)
    if stream is not None and sigma is not None:
        _changed(sigma, stream.mean, stream.count)
    z, sign = adjusted_logits(inputs, options, weight, table)
    loss, inverse = reduce_losses(z, labels, options)
    return loss, SavedLoss(z, sign, inverse, groups)


def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedLoss | SavedParts,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype, others in the compute dtype."""
    if isinstance(saved, SavedParts):
        return small_backward.loss_backward(inputs, options, saved, grad_loss, needs)
    weight = inputs.weight.to(inputs.compute_dtype).contiguous()
    sigma, groups = inputs.covariance, saved.groups
    full = sigma is not None and sigma.dim() == 3
    row_scale = grad_loss if saved.inverse is None else grad_loss * saved.inverse
    row_scale = row_scale.reshape(-1).contiguous()

    grads = LossGradients()
    more = None
    if full and groups is not None and (needs.weight or needs.covariance):
        labels = inputs.labels.contiguous()
        curvature = class_sums(
            saved.residual, labels, row_scale, options.alpha, options.ignore_index
        )
        assert sigma is not None
        if needs.weight:
            plain = sigma.to(weight.dtype).contiguous()
            more = weight_shares(plain, weight, curvature, groups.size)
        if needs.covariance:
            grads.covariance = weight.new_empty(sigma.shape)
            add_pair_terms(grads.covariance, weight, groups, curvature, fresh=True)
    diagonal = sigma is not None and not full
    dtype = inputs.features.dtype if needs.features else None
    if diagonal and needs.weight:
        dtype = weight.dtype  # the gradient of W is made of it
    sign = saved.sign if needs.epsilon else None
    feature_gradient = None
    if dtype is not None or sign is not None:
        feature_gradient, grads.epsilon = grad_features(
            saved.residual, weight, row_scale, sign, dtype
        )
    if needs.features:
        grads.features = feature_gradient
    if needs.weight or needs.bias or needs.log_prior:
        grads.weight, sums = grad_weight(
            inputs, options, weight, saved.residual, row_scale, saved.sign,
            feature_gradient if diagonal else None, more,
            needs.weight, needs.bias or needs.log_prior,
        )  # fmt: skip
        if needs.bias:
            grads.bias = sums
        if needs.log_prior and sums is not None:
            grads.log_prior = sums * options.beta
    if diagonal and needs.covariance and groups is not None:
        grads.covariance = grad_variances(saved.residual, row_scale, groups, weight, options.alpha)
    return grads


def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    """One batch, in place on covariance (C, A, A) or (C, A), mean (C, A) and count (C) int64."""
    state = (covariance, mean, count)
    plain = [covariance.to(mean.dtype).contiguous(), mean.contiguous(), count.contiguous()]
    groups = group_rows(labels.contiguous(), len(mean), -1, plain[2], mean.dtype)
    features, full = by_rows(features), covariance.dim() == 3
    moments = update_moments(features, groups, plain[1], None if full else plain[0])
    if full:
        stream_and_table(plain[0], None, groups, features, moments)
    for tensor, changed in zip(state, plain, strict=True):
        if tensor is not changed:
            tensor.copy_(changed)
    _changed(*state)


def flatten(saved: SavedLoss | SavedParts) -> list[Tensor | None]:
    """The tensors of `saved` in a row."""
    if isinstance(saved, SavedParts):
        return list(saved)
    return [saved.residual, saved.sign, saved.inverse, *(saved.groups or (None,) * 4)]


def unflatten(tensors: list[Tensor | None]) -> SavedLoss | SavedParts:
    """The inverse of `flatten`; its two records differ in length."""
    if len(tensors) == len(SavedParts._fields):
        size, sums, *parts = tensors
        assert size is not None
        assert sums is not None
        return SavedParts(size, sums, *parts)
    residual, sign, inverse, start, size, order, share = tensors
    assert residual is not None
    if start is None or size is None or order is None:
        return SavedLoss(residual, sign, inverse, None)
    return SavedLoss(residual, sign, inverse, Groups(start, size, order, share))


def _in_place(inputs: LossInputs, stream: ClassStatistics, dtype: torch.dtype) -> bool:
    """Whether the kernels can update the state where it lies while they compute the loss."""
    sigma = inputs.covariance
    assert sigma is not None
    state = (sigma, stream.mean, stream.count)
    return sigma.dtype == stream.mean.dtype == dtype and all(t.is_contiguous() for t in state)


def _changed(*state: Tensor) -> None:
    """Autograd must notice that Σ changed under a loss that still needs it."""
    torch.autograd.graph.increment_version(state)
