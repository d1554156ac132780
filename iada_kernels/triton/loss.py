"""The IADA loss and its gradients by Triton kernels, for any N, C and A.

Launches of this package, for a full Σ and ε given (a sum over partials may add one of torch's):
    forward   4  rows of each class and first logits, moments and sign, class pass, logits and loss
    backward  2  products of D (class sums, features, weight), class pass onto the weight
With a diagonal Σ 3 and 2, without Σ 3 and 1; the streaming update adds none. One more where softmax
and loss are not part of the logits' launch, see `head`. Where W and Σ_c fit in one program: forward
1, backward 1 (`single_launch`).
"""

from typing import NamedTuple

from torch import Tensor

from iada_kernels.contract import (
    ClassStatistics,
    LossGradients,
    LossInputs,
    LossNeeds,
    LossOptions,
)
from iada_kernels.layout import contiguous_as
from iada_kernels.streaming import (
    is_writable,
    mark_updated,
    update_statistics,
    writable,
    write_back,
)
from iada_kernels.triton import single_launch, single_launch_backward
from iada_kernels.triton.class_loss import SavedParts
from iada_kernels.triton.class_pass import HeadWeight, rank_c_update, stream_and_table
from iada_kernels.triton.class_pass_backward import add_table_gradient, table_counters
from iada_kernels.triton.forward import Dealt, forward, moments_and_sign, rows_and_logits
from iada_kernels.triton.head_backward import Wanted, add_parts, grad_variances, head_products
from iada_kernels.triton.launch import planned
from iada_kernels.triton.moments import Moments
from iada_kernels.triton.plans import own
from iada_kernels.triton.records import Labels, Samples, Sizes
from iada_kernels.triton.rows import Groups


@own
class SavedLoss(NamedTuple):
    """What the backward pass needs beside the inputs."""

    residual: Tensor  # D (N, C)
    sign: Tensor | None  # s (N, A)
    inv_count: Tensor | None  # (1), 1/n for the mean, 1 for the sum
    groups: Groups | None


@planned
def loss_forward(
    inputs: LossInputs,
    options: LossOptions,
    needs: LossNeeds,
    stream: ClassStatistics | None = None,
) -> tuple[Tensor, SavedLoss | SavedParts]:
    """The reduced loss and what `loss_backward` needs; a `stream` is updated first."""
    sigma, dtype = inputs.covariance, inputs.compute_dtype
    state = None
    if stream is not None and sigma is not None:
        state = (sigma, stream.mean, stream.count)
    if single_launch.is_supported(inputs, options, stream):
        result = single_launch.loss_forward(inputs, options, needs, stream)
        if state is not None:
            mark_updated(state)
        return result
    if stream is not None and state is not None and not is_writable(state, dtype):
        update_statistics(covariance_update, inputs, options, stream)
        stream = state = None
    passed = forward(inputs, options, needs.covariance, stream)
    if state is not None:
        mark_updated(state)
    saved = SavedLoss(passed.residual, passed.sign, passed.inv_count, passed.groups)
    return passed.loss, saved


@planned
def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedLoss | SavedParts,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype or, as others, the compute dtype."""
    if isinstance(saved, SavedParts):
        return single_launch_backward.loss_backward(inputs, options, saved, grad_loss, needs)
    weight = contiguous_as(inputs.weight, inputs.compute_dtype)
    sigma, groups = inputs.covariance, saved.groups
    full = inputs.has_full_covariance
    row_scale = grad_loss if saved.inv_count is None else grad_loss * saved.inv_count
    row_scale = row_scale.reshape(-1).contiguous()

    grads, arrived = LossGradients(), None
    diagonal = sigma is not None and not full
    wanted = Wanted(
        sums=full and (needs.weight or needs.covariance),
        features=inputs.features.dtype if needs.features else None,
        epsilon=needs.epsilon and saved.sign is not None,
        weight=needs.weight,
        bias=needs.bias or needs.log_prior,
    )
    tensors = (weight, saved.residual, row_scale, saved.sign)
    if diagonal and needs.weight:  # which is made of the gradient of the features
        first = wanted._replace(features=weight.dtype, weight=False, bias=False)
        rows = head_products(inputs, options, *tensors, first)
        second = Wanted(weight=True, bias=wanted.bias)
        products = head_products(inputs, options, *tensors, second, rows.features)
        products = products._replace(features=rows.features, epsilon=rows.epsilon)
    else:
        arrived = table_counters(weight) if full and needs.weight else None
        products = head_products(inputs, options, *tensors, wanted, arrived=arrived)
    if full and groups is not None and sigma is not None and products.sums is not None:
        if products.weight is not None and arrived is not None:
            read = contiguous_as(sigma, weight.dtype)
            onto = products.weight if products.weight.dim() == 2 else products.weight[0]
            add_table_gradient(read, weight, products.sums, groups.size, onto, arrived)
        if needs.covariance:
            grads.covariance = weight.new_empty(sigma.shape)
            head = HeadWeight(weight, None)
            rank_c_update(grads.covariance, head, groups, products.sums, overwrite=True)
    if needs.features:
        grads.features = products.features
    grads.epsilon, grads.weight = products.epsilon, add_parts(products.weight, 2)
    if needs.bias:
        grads.bias = products.bias
    if needs.log_prior and products.bias is not None:
        grads.log_prior = products.bias * options.beta
    if diagonal and needs.covariance and groups is not None:
        grads.covariance = grad_variances(saved.residual, row_scale, groups, weight, options.alpha)
    return grads


@planned
def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    """One batch, in place on covariance (C, A, A) or (C, A), mean (C, A) and count (C) int64."""
    state = (covariance, mean, count)
    written = sigma, mean, count = writable(state, mean.dtype)
    samples, full = Samples.plain(features, mean.dtype), sigma.dim() == 3
    rows = Labels(labels.contiguous(), -1)
    groups, moments = Groups.empty(rows, len(mean)), Moments.of(mean)
    dealt = Dealt(samples, rows, Sizes(len(labels), *mean.shape), groups, moments)
    rows_and_logits(dealt, mean, count)
    moments_and_sign(dealt, mean, None if full else sigma)
    if full:
        stream_and_table(sigma, None, groups, samples, moments)
    write_back(state, written)


def flatten(saved: SavedLoss | SavedParts) -> list[Tensor | None]:
    """The tensors of `saved` as one list, whose first is None for a single launch's."""
    if isinstance(saved, SavedParts):
        return [None, *saved]
    return [saved.residual, saved.sign, saved.inv_count, *(saved.groups or (None,) * 3)]


def unflatten(tensors: list[Tensor | None]) -> SavedLoss | SavedParts:
    """The inverse of `flatten`."""
    residual, *others = tensors
    if residual is None:
        size, sums, *parts = others
        assert size is not None
        assert sums is not None
        return SavedParts(size, sums, *parts)
    sign, inv_count, start, size, order = others
    if start is None or size is None or order is None:
        return SavedLoss(residual, sign, inv_count, None)
    return SavedLoss(residual, sign, inv_count, Groups(start, size, order))
