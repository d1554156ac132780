"""The passes as torch operators, for torch.compile; eager calls go to the launchers directly.

Each operator is its launcher, and its fake is the same launcher with nothing launched, so that
shapes cannot differ. Records go through the operators' schemas as lists of their tensors. An absent
tensor among results is an empty one of dtype uint8. Heads of many classes go to `class_blocks`.
"""

from collections.abc import Sequence
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
from iada_kernels.streaming import update_statistics
from iada_kernels.torch_ops import class_blocks
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
    if class_blocks.has_many_classes(inputs):
        if stream is not None:
            update_statistics(_loss.covariance_update, inputs, options, stream)
        return class_blocks.loss_forward(inputs, options, needs)
    if not torch.compiler.is_compiling():
        return _loss.loss_forward(inputs, options, needs, stream)
    if stream is not None:
        update_statistics(_update, inputs, options, stream)
    loss, *saved = _forward(list(inputs), *options.values(), list(needs))
    return loss, list(saved)  # torch 2.11 traces `*saved` as a tuple


def loss_backward(
    inputs: LossInputs, options: LossOptions, saved: Any, grad_loss: Tensor, needs: LossNeeds
) -> LossGradients:
    """See `contract.Backend`."""
    if isinstance(saved, class_blocks.SavedRows):
        return class_blocks.loss_backward(inputs, options, saved, grad_loss, needs)
    if not isinstance(saved, list):
        return _loss.loss_backward(inputs, options, saved, grad_loss, needs)
    arguments = (list(inputs), *options.values(), saved, grad_loss, list(needs))
    return LossGradients(*map(_present, _backward(*arguments)))


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
    compute = _characteristics_operator if compiling else _characteristics.characteristics
    return compute(features, logits, labels, weight, neighbours)


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, Any]:
    """See `contract.Backend`."""
    if not torch.compiler.is_compiling():
        return _hypergradient.hypergradient(inputs, options, tangents, needs_covariance)
    arguments = (list(inputs), *options.values(), *tangents, needs_covariance)
    grad_epsilon, *sums = _hypergradient_operator(*arguments)
    return _present(grad_epsilon), (list(sums), options.alpha) if needs_covariance else None


def covariance_step(
    covariance: Tensor, weight: Tensor, weight_tangent: Tensor, sums: Any, scale: float
) -> None:
    """See `contract.Backend`."""
    if isinstance(sums, _hypergradient.Sums):
        _hypergradient.covariance_step(covariance, weight, weight_tangent, sums, scale)
    else:
        tensors, alpha = sums
        _step(covariance, weight, weight_tangent, tensors, alpha, scale)


def covariance_step_bound(weight: Tensor, weight_tangent: Tensor, sums: Any) -> None:
    """See `contract.Backend`: who reads a bound on a GPU would wait for it."""


# Absent results -------------------------------------------------------------------------------


def _absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8) if tensor is None else tensor


def _present(tensor: Tensor) -> Tensor | None:
    return None if tensor.dtype == torch.uint8 else tensor


# The operators --------------------------------------------------------------------------------


def _run_forward(
    tensors: Sequence[Tensor | None],
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs, options = _records(tensors, alpha, beta, ignore_index, reduction)
    loss, saved = _loss.loss_forward(inputs, options, LossNeeds(*needs))
    return [loss, *(_absent(tensor, loss) for tensor in _loss.flatten(saved))]


def _run_backward(
    tensors: Sequence[Tensor | None],
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: str,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs, options = _records(tensors, alpha, beta, ignore_index, reduction)
    record = _loss.unflatten([_present(tensor) for tensor in saved])
    grads = _loss.loss_backward(inputs, options, record, grad_loss, LossNeeds(*needs))
    return [_absent(grad, grad_loss) for grad in grads.tensors()]


def _run_hypergradient(
    tensors: Sequence[Tensor | None],
    alpha: float,
    beta: float,
    ignore_index: int,
    reduction: str,
    feature_tangent: Tensor | None,
    weight_tangent: Tensor,
    bias_tangent: Tensor | None,
    needs_covariance: bool,
) -> list[Tensor]:
    inputs, options = _records(tensors, alpha, beta, ignore_index, reduction)
    tangents = HeadTangents(feature_tangent, weight_tangent, bias_tangent)
    grad, sums = _hypergradient.hypergradient(inputs, options, tangents, needs_covariance)
    if sums is None:
        return [_absent(grad, weight_tangent)]
    parts = (sums.residual, sums.curvature, sums.row_scale, *sums.groups)
    return [_absent(part, weight_tangent) for part in (grad, *parts)]


def _run_step(
    covariance: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    sums: Sequence[Tensor],
    alpha: float,
    scale: float,
) -> None:
    residual, curvature, row_scale, start, size, order = sums
    groups = Groups(start, size, order)
    record = _hypergradient.Sums(residual, curvature, _present(row_scale), alpha, groups)
    _hypergradient.covariance_step(covariance, weight, weight_tangent, record, scale)


def _records(
    tensors: Sequence[Tensor | None], *numbers: float | int | str
) -> tuple[LossInputs, LossOptions]:
    """The inverse of `list(inputs)` and `options.values()`."""
    return LossInputs(*tensors), LossOptions(*numbers)  # type: ignore[arg-type]


def _operator(name: str, run: Any, mutates: tuple[str, ...] = ()) -> Any:
    operator = torch.library.custom_op(f"iada_triton::{name}", run, mutates_args=mutates)

    @operator.register_fake
    def _(*arguments: Any) -> Any:
        with recording(execute=False):
            return run(*arguments)

    return operator


_forward = _operator("loss_forward", _run_forward)
_backward = _operator("loss_backward", _run_backward)
_update = _operator("covariance_update", _loss.covariance_update, ("covariance", "mean", "count"))
_characteristics_operator = _operator("characteristics", _characteristics.characteristics)
_hypergradient_operator = _operator("hypergradient", _run_hypergradient)
_step = _operator("covariance_step", _run_step, ("covariance",))
