"""The passes as torch operators, for torch.compile; eager calls go to the launchers directly.

Each operator is its launcher, and its fake is the same launcher with nothing launched, so that
shapes cannot differ. An absent tensor among results is an empty one of dtype uint8.
"""

from typing import Any

import torch
from torch import Tensor

from iada_kernels.contract import (
    ClassStatistics,
    HeadTangents,
    LossGradients,
    LossInputs,
    LossNeeds,
    LossOptions,
)
from iada_kernels.triton import characteristics as _characteristics
from iada_kernels.triton import hypergradient as _hypergradient
from iada_kernels.triton import loss as _loss
from iada_kernels.triton.launch import recording
from iada_kernels.triton.rows import Groups


def loss_forward(
    inputs: LossInputs,
    options: LossOptions,
    needs: LossNeeds,
    stream: ClassStatistics | None = None,
) -> tuple[Tensor, Any]:
    """See `contract.Backend`."""
    if not torch.compiler.is_compiling():
        return _loss.loss_forward(inputs, options, needs, stream)
    if stream is not None:
        assert inputs.covariance is not None
        counted = torch.where(inputs.labels == options.ignore_index, -1, inputs.labels)
        _update(inputs.covariance, stream.mean, stream.count, inputs.features, counted)
    found = _forward(*_plain(inputs, options), _bits(needs))
    return found[0], found[1:]


def loss_backward(
    inputs: LossInputs, options: LossOptions, saved: Any, grad_loss: Tensor, needs: LossNeeds
) -> LossGradients:
    """See `contract.Backend`."""
    if not isinstance(saved, list):
        return _loss.loss_backward(inputs, options, saved, grad_loss, needs)
    return LossGradients(
        *map(_present, _backward(*_plain(inputs, options), saved, grad_loss, _bits(needs)))
    )


def covariance_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    """See `contract.Backend`."""
    compiling = torch.compiler.is_compiling()
    update = _update if compiling else _loss.covariance_update
    update(covariance, mean, count, features, labels)


def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """See `contract.Backend`."""
    compiling = torch.compiler.is_compiling()
    compute = _traits if compiling else _characteristics.characteristics
    return compute(features, logits, labels, weight, neighbours)


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, Any]:
    """See `contract.Backend`."""
    if not torch.compiler.is_compiling():
        return _hypergradient.hypergradient(inputs, options, tangents, needs_covariance)
    directions = (tangents.features, tangents.weight, tangents.bias)
    found = _meta(*_plain(inputs, options), *directions, needs_covariance)
    return _present(found[0]), (found[1:], options.alpha) if needs_covariance else None


def covariance_step(
    covariance: Tensor, weight: Tensor, weight_tangent: Tensor, sums: Any, scale: float
) -> None:
    """See `contract.Backend`."""
    if isinstance(sums, _hypergradient.Sums):
        _hypergradient.covariance_step(covariance, weight, weight_tangent, sums, scale)
    else:
        found, alpha = sums
        _step(covariance, weight, weight_tangent, found, alpha, scale)


# Plain arguments and back --------------------------------------------------------------------


def _plain(inputs: LossInputs, options: LossOptions) -> tuple[Any, ...]:
    tensors = (inputs.features, inputs.weight, inputs.bias, inputs.labels)
    more = (inputs.covariance, inputs.epsilon, inputs.log_prior)
    return (
        *tensors,
        *more,
        options.alpha,
        options.beta,
        options.ignore_index,
        options.reduction,
    )


def _records(arguments: tuple[Any, ...]) -> tuple[LossInputs, LossOptions]:
    return LossInputs(*arguments[:7]), LossOptions(*arguments[7:])


def _bits(needs: LossNeeds) -> list[bool]:
    return [
        needs.features,
        needs.weight,
        needs.bias,
        needs.covariance,
        needs.epsilon,
        needs.log_prior,
    ]


def _absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8) if tensor is None else tensor


def _present(tensor: Tensor) -> Tensor | None:
    return None if tensor.dtype == torch.uint8 else tensor


# The operators ------------------------------------------------------------------------------


def _run_forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: str,
    needs: list[bool],
) -> list[Tensor]:
    arguments = (features, weight, bias, labels, covariance, epsilon, log_prior)
    inputs, options = _records((*arguments, alpha, beta, ignore_index, reduction))
    loss, saved = _loss.loss_forward(inputs, options, LossNeeds(*needs))
    return [loss, *(_absent(tensor, loss) for tensor in _loss.flatten(saved))]


def _run_backward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: str,
    saved: list[Tensor],
    grad_loss: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    arguments = (features, weight, bias, labels, covariance, epsilon, log_prior)
    inputs, options = _records((*arguments, alpha, beta, ignore_index, reduction))
    kept = _loss.unflatten([_present(tensor) for tensor in saved])
    found = _loss.loss_backward(inputs, options, kept, grad_loss, LossNeeds(*needs))
    grads = (found.features, found.weight, found.bias, found.covariance)
    more = (found.epsilon, found.log_prior)
    return [_absent(grad, grad_loss) for grad in (*grads, *more)]


def _run_update(
    covariance: Tensor, mean: Tensor, count: Tensor, features: Tensor, labels: Tensor
) -> None:
    _loss.covariance_update(covariance, mean, count, features, labels)


def _run_characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    return _characteristics.characteristics(features, logits, labels, weight, neighbours)


def _run_hypergradient(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: str,
    feature_tangent: Tensor | None,
    weight_tangent: Tensor,
    bias_tangent: Tensor | None,
    needs_covariance: bool,
) -> list[Tensor]:
    arguments = (features, weight, bias, labels, covariance, epsilon, log_prior)
    inputs, options = _records((*arguments, alpha, beta, ignore_index, reduction))
    tangents = HeadTangents(feature_tangent, weight_tangent, bias_tangent)
    grad, sums = _hypergradient.hypergradient(inputs, options, tangents, needs_covariance)
    if sums is None:
        return [_absent(grad, weight)]
    parts = (sums.residual, sums.curvature, sums.row_scale, *sums.groups[:3])
    return [_absent(part, weight) for part in (grad, *parts)]


def _run_step(
    covariance: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    sums: list[Tensor],
    alpha: float,
    scale: float,
) -> None:
    residual, curvature, row_scale, start, size, order = sums
    groups = Groups(start, size, order, None)
    record = _hypergradient.Sums(residual, curvature, _present(row_scale), alpha, groups)
    _hypergradient.covariance_step(covariance, weight, weight_tangent, record, scale)


def _operator(name: str, run: Any, mutates: tuple[str, ...] = ()) -> Any:
    operator = torch.library.custom_op(f"iada_triton::{name}", run, mutates_args=mutates)

    @operator.register_fake
    def _(*arguments: Any) -> Any:
        with recording(execute=False):
            return run(*arguments)

    return operator


_forward = _operator("loss_forward", _run_forward)
_backward = _operator("loss_backward", _run_backward)
_update = _operator("covariance_update", _run_update, ("covariance", "mean", "count"))
_traits = _operator("characteristics", _run_characteristics)
_meta = _operator("hypergradient", _run_hypergradient)
_step = _operator("covariance_step", _run_step, ("covariance",))
