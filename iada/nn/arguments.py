"""From what people pass to the records of the kernels, and from the losses of rows to one.

`fused_loss`, `eager_loss` and `IADALoss` take the same arguments; what they have in common is here:
leading dimensions, the checks, probabilities as labels, weights of rows, logits on request.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.nn.class_covariance import ClassCovariance
from iada.utils.autocast import full_precision
from iada.utils.checks import (
    argument_error,
    check_device,
    check_float,
    check_loss_arguments,
    check_weights,
)
from iada.utils.distributed import Group, add_up, size_of
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.low_rank import LowRankCovariance


class Extras(NamedTuple):
    """What the front doors offer beside Eq. 6: weights of the rows, and the logits."""

    class_weight: Tensor | None = None  # (C)
    row_weight: Tensor | None = None  # as the labels
    return_logits: bool = False


NO_EXTRAS = Extras()


def loss_of_rows(
    compute: Callable[[LossInputs, LossOptions], Tensor],
    inputs: LossInputs,
    options: LossOptions,
    extras: Extras = NO_EXTRAS,
    streams: bool = False,
    group: Group = None,
) -> Tensor:
    """Checks the arguments, has `compute` give the loss of rows (N, A), and finishes it.

    `inputs` may have leading dimensions, a `ClassCovariance` or `LowRankCovariance` for its tensor,
    and labels of any integer dtype; `compute` gets them as `LossInputs` says. With `streams`,
    features must be finite too. ValueError names the argument that does not fit. With a group,
    whose ranks all have rows of the batch, the mean over the ranks of the losses is that of the
    batch.
    """
    leading, features = None, inputs.features
    if isinstance(inputs.covariance, ClassCovariance):
        inputs = inputs._replace(covariance=inputs.covariance.shrunk())
    elif isinstance(inputs.covariance, LowRankCovariance):
        inputs = inputs._replace(covariance=_packed(inputs.covariance, inputs.weight))
    soft = _is_soft(inputs)
    if isinstance(features, Tensor) and features.dim() != 2:
        leading = features.shape[:-1]
        inputs, extras = _flat(inputs, extras, soft)
    if soft:
        loss = _soft_target_loss(inputs, options, extras)
    else:
        check_loss_arguments(inputs, options, streams)
        loss = _hard_label_loss(compute, inputs, options, extras, group)
    if leading is not None and options.reduction == "none":
        loss = loss.view(leading)
    if not extras.return_logits:
        return loss
    logits = _logits(inputs).detach()
    both = loss, logits if leading is None else logits.view(*leading, logits.shape[-1])
    return cast(Tensor, both)  # a tuple on request alone: no overload repeats the signature


def _hard_label_loss(
    compute: Callable[[LossInputs, LossOptions], Tensor],
    inputs: LossInputs,
    options: LossOptions,
    extras: Extras,
    group: Group,
) -> Tensor:
    if inputs.labels.dtype != torch.int64:
        inputs = inputs._replace(labels=inputs.labels.long())
    if type(options.alpha) is int or type(options.beta) is int:
        options = options._replace(alpha=float(options.alpha), beta=float(options.beta))
    reduction = options.reduction
    with full_precision(inputs.features.device):
        if extras.class_weight is not None or extras.row_weight is not None:
            weights = _row_weights(inputs, options, extras)
            losses = compute(inputs, options._replace(reduction="none"))
            losses = losses.masked_fill(weights == 0, 0.0)  # an infinite one too is left out
            if group is None or reduction == "none":
                return _reduce(losses, weights, reduction)
            return _share(torch.linalg.vecdot(losses, weights), weights.sum(), reduction, group)
        if group is None or reduction == "none":
            return compute(inputs, options)
        total = compute(inputs, options._replace(reduction="sum"))
        rows = inputs.labels.ne(options.ignore_index).sum()
        return _share(total, rows, reduction, group)


def _share(total: Tensor, weight: Tensor, reduction: str, group: Group) -> Tensor:
    """Σ w ℓ of this rank's rows so that the mean over the ranks is the loss of all rows.

    weight: Σ w, (), of this rank; it becomes that of all.
    """
    total = total * size_of(group)
    if reduction == "sum":
        return total
    add_up([weight], group)
    return total / weight.to(total.dtype).masked_fill(weight <= 0, 1.0)


def _row_weights(inputs: LossInputs, options: LossOptions, extras: Extras) -> Tensor:
    """The constant weight of each row, (N), 0 where it is ignored, in the dtype of the losses."""
    class_weight, row_weight = extras.class_weight, extras.row_weight
    ignored, dtype = inputs.labels == options.ignore_index, inputs.compute_dtype
    weights = torch.ones_like(ignored, dtype=dtype)
    if class_weight is not None:
        _check_weights("class_weight", class_weight, len(inputs.weight), inputs.features)
        if options.label_smoothing:
            raise not_both()
        weights = class_weight.detach().to(dtype)[inputs.labels.masked_fill(ignored, 0)]
    if row_weight is not None:
        _check_weights("row_weight", row_weight, len(inputs.labels), inputs.features)
        weights = weights * row_weight.detach().to(dtype)
    return weights.masked_fill(ignored, 0.0)


def not_both() -> ValueError:
    """Of class_weight and label_smoothing with indices: which classes the smoothing weighs."""
    remedy = "pass row_weight=class_weight[labels.clamp(min=0)]: the share of smoothing has none"
    return argument_error("class_weight", "None with label_smoothing", "both", remedy)


def _check_weights(name: str, weights: Tensor, count: int, features: Tensor) -> None:
    kind = "class" if name == "class_weight" else "row"
    check_weights(name, weights, count, kind)
    check_device(name, weights, features.device, "features")


def _reduce(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """Σ w ℓ / Σ w, Σ w ℓ, or the w ℓ themselves; a mean over no weight is 0."""
    if reduction == "none":
        return losses * weights
    total = torch.linalg.vecdot(losses, weights)
    if reduction == "sum":
        return total
    weight = weights.sum()
    return total / torch.where(weight > 0, weight, 1.0)


def _is_soft(inputs: LossInputs) -> bool:
    """Whether the labels are probabilities (…, C) beside features (…, A)."""
    features, labels = inputs.features, inputs.labels
    if not isinstance(labels, Tensor) or not labels.dtype.is_floating_point:
        return False
    return isinstance(features, Tensor) and labels.dim() == features.dim()


def _soft_target_loss(inputs: LossInputs, options: LossOptions, extras: Extras) -> Tensor:
    """CE of the prior-adjusted logits against probabilities (N, C), as `F.cross_entropy` has it.

    Σ_y and the direction s belong to one class y, so that neither a covariance nor an epsilon is
    defined here.
    """
    for name in ("covariance", "epsilon"):
        if getattr(inputs, name) is not None:
            expected = f"class indices where there is {name}: Σ_y and s belong to one class y"
            remedy = (
                "mixed labels: add the losses of each label with row_weight=its share and "
                "reduction='sum', and divide by the number of rows"
            )
            got = f"probabilities {tuple(inputs.labels.shape)}"
            raise argument_error("labels", expected, got, remedy)
    count, num_classes = len(inputs.features), len(inputs.weight)
    expected = f"probabilities ({count}, {num_classes}) of the classes, or class indices ({count},)"
    check_float("labels", inputs.labels, expected, (count, num_classes))
    indices = torch.zeros(count, dtype=torch.int64, device=inputs.labels.device)
    check_loss_arguments(inputs._replace(labels=indices), options)
    if extras.class_weight is not None:
        _check_weights("class_weight", extras.class_weight, num_classes, inputs.features)
    with full_precision(inputs.features.device):
        logits = _logits(inputs)
        if inputs.log_prior is not None:
            logits = logits + options.beta * inputs.log_prior.to(logits.dtype)
        target, smoothing = inputs.labels.to(logits.dtype), options.label_smoothing
        weight = extras.class_weight
        weight = None if weight is None else weight.detach().to(logits.dtype)
        if inputs.log_prior is not None:  # 0 · ∞ is NaN: what has no share or weight is no term
            shares = (1 - smoothing) * target + smoothing / num_classes
            shares = shares if weight is None else shares * weight
            unseen = logits.isneginf() & (shares == 0)
            logits = logits.masked_fill(unseen, torch.finfo(logits.dtype).min / 2)
        losses = F.cross_entropy(
            logits, target, weight, reduction="none", label_smoothing=smoothing
        )
        if extras.row_weight is not None:
            _check_weights("row_weight", extras.row_weight, count, inputs.features)
            weights = extras.row_weight.detach().to(losses.dtype)
            return _reduce(losses.masked_fill(weights == 0, 0.0), weights, options.reduction)
        if options.reduction == "none":
            return losses
        return losses.sum() / (max(1, count) if options.reduction == "mean" else 1)


def _packed(covariance: LowRankCovariance, weight: Tensor) -> Tensor:
    """As kernels take it, checked."""
    sizes = tuple(weight.shape) if isinstance(weight, Tensor) else (None, None)
    for name, tensor, shape in zip(
        covariance._fields, covariance, (sizes, (*sizes, None)), strict=True
    ):
        expected = f"a floating-point tensor {('(C, A)', '(C, A, r)')[len(shape) - 2]}"
        check_float(f"covariance.{name}", tensor, expected, shape)
    check_device("covariance.factors", covariance.factors, covariance.diagonal.device, "diagonal")
    return covariance.packed()


def _logits(inputs: LossInputs) -> Tensor:
    """z = Wh + b, (N, C), in the dtype of the loss."""
    dtype = inputs.compute_dtype
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    with full_precision(inputs.features.device):
        return F.linear(inputs.features.to(dtype), inputs.weight.to(dtype), bias)


def _flat(inputs: LossInputs, extras: Extras, soft: bool) -> tuple[LossInputs, Extras]:
    """Leading dimensions of features, labels, epsilon and row_weight as one."""
    features = inputs.features
    if features.dim() == 0:
        raise argument_error("features", "(…, A)", "a scalar", "pass last-layer features")
    leading = features.shape[:-1]
    labels = inputs.labels
    if features.dim() == 4 and isinstance(labels, Tensor) and labels.shape == leading[:1]:
        remedy = "pool the map: features.mean((2, 3))"
        got = f"a map {tuple(features.shape)}"
        raise argument_error("features", f"a row for each of {len(labels)} labels", got, remedy)

    places = (features.shape[0], *features.shape[2:])  # of channels first
    if isinstance(labels, Tensor) and labels.shape == places != leading:
        got, remedy = f"{tuple(features.shape)}, channels first", "pass features.movedim(1, -1)"
        raise argument_error("features", f"{(*places, features.shape[1])}", got, remedy)

    def flat(name: str, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.shape != leading:
            expected = f"one for each row of features, {tuple(leading)}"
            raise argument_error(name, expected, f"shape {tuple(tensor.shape)}", "reshape it")
        return tensor.reshape(-1)

    labels = labels.reshape(-1, labels.shape[-1]) if soft else flat("labels", labels)
    features, epsilon = features.reshape(-1, features.shape[-1]), flat("epsilon", inputs.epsilon)
    inputs = inputs._replace(features=features, labels=labels, epsilon=epsilon)
    return inputs, extras._replace(row_weight=flat("row_weight", extras.row_weight))
