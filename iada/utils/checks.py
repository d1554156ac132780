"""Checks of arguments: each error names the argument, what was expected, what came, the remedy.

Checks of shape, dtype and device are always made. Checks of values read the tensors: they are
always made for CPU tensors, and for others only inside `value_checks()`, because they wait for
the device. What is nearly always right is recognised by one quick look, and only what that does not
recognise is taken apart to say what is wrong with it.
"""

import contextlib
import contextvars
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from iada_kernels import native
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.triangular import triangular_shape

_value_checks = contextvars.ContextVar("value_checks", default=False)

REDUCTIONS = ("none", "mean", "sum")


@contextlib.contextmanager
def value_checks() -> Iterator[None]:
    """Check values on accelerators too (labels in range, numbers finite), at the cost of a wait.

    Examples:
        >>> with iada.value_checks():
        ...     loss = iada.fused_loss(features, head.weight, head.bias, labels)
    """
    token = _value_checks.set(True)
    try:
        yield
    finally:
        _value_checks.reset(token)


def argument_error(name: object, expected: str, got: object, remedy: str) -> ValueError:
    """The one form of message this package raises about an argument, or about a file."""
    return ValueError(f"{name}: expected {expected}, got {got}; {remedy}")


def check_choice(
    name: str, value: object, allowed: Collection[object], remedy: str = "pass one of these"
) -> None:
    """Raises ValueError for a value that is none of these."""
    if value not in allowed:
        raise argument_error(name, f"one of {', '.join(map(repr, allowed))}", repr(value), remedy)


def check_count(name: str, value: object, least: int = 1, remedy: str = "pass one") -> None:
    """Raises ValueError for what is no whole number from `least` on."""
    if type(value) is not int or value < least:
        raise argument_error(name, f"a whole number from {least} on", repr(value), remedy)


def check_float(name: str, tensor: Tensor, expected: str, sizes: tuple[int | None, ...]) -> None:
    """A floating-point tensor of the given sizes (None: any)."""
    check_tensor(name, tensor, expected)
    if not tensor.dtype.is_floating_point:
        raise argument_error(name, expected, f"dtype {tensor.dtype}", f"convert it: {name}.float()")
    check_sizes(name, tensor, expected, sizes)


def check_tensor(name: str, tensor: Tensor, expected: str) -> None:
    """A torch tensor, whatever its dtype."""
    if not isinstance(tensor, Tensor):
        got, remedy = f"a {type(tensor).__name__}", "wrap it with torch.as_tensor(...)"
        if tensor is None:
            got, remedy = "None", "look at where it is made"
        elif isinstance(tensor, nn.Module):
            remedy = "pass its parameter: head.weight, head.bias"
        raise argument_error(name, expected, got, remedy)
    if is_sharded(tensor):
        remedy = (
            f"pass {name}.full_tensor(grad_placements=[Partial('avg')]), or compute the loss in "
            "the sharded module's own forward: docs/distributed.md"
        )
        raise argument_error(name, expected, "a DTensor, which lies on several processes", remedy)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP's parameters are; without importing what defines them."""
    return hasattr(tensor, "full_tensor")


def check_sizes(name: str, tensor: Tensor, expected: str, sizes: tuple[int | None, ...]) -> None:
    """As many axes as `sizes`, each of that size (None: any)."""
    same = len(sizes) == tensor.dim() and all(
        want is None or want == have for want, have in zip(sizes, tensor.shape, strict=True)
    )
    if not same:
        wanted = tuple("any" if size is None else size for size in sizes)
        remedy = (
            f"reshape or slice it to ({', '.join(map(str, wanted))}), or mend the tensor that "
            "sets these sizes"
        )
        raise argument_error(name, expected, f"shape {tuple(tensor.shape)}", remedy)


def check_device(name: str, tensor: Tensor, device: torch.device, peer: str) -> None:
    """On `device`, where `peer` is."""
    if tensor.device != device:
        expected, got = f"a tensor on {device}, where {peer} is", f"one on {tensor.device}"
        raise argument_error(name, expected, got, f"move it: {name}.to({str(device)!r})")


def check_labels(labels: Tensor, count: int) -> None:
    """Integer labels (N); which values are allowed is checked by `check_label_values`."""
    check_indices("labels", labels, count, "class indices")


def check_indices(name: str, indices: Tensor, count: int, kind: str) -> None:
    """Integers of that kind, (N)."""
    expected = f"integer {kind} ({count},), one for each row of features"
    check_tensor(name, indices, expected)
    dtype = indices.dtype
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise argument_error(name, expected, f"dtype {dtype}", f"convert: {name}.long()")
    if indices.dim() == 2 and len(indices) == count and name == "labels":
        remedy = "pass labels.argmax(1) of one-hot rows"
        if indices.shape[1] == 1:
            remedy = "pass labels.squeeze(1)"
        raise argument_error(name, expected, f"shape {tuple(indices.shape)}", remedy)
    check_sizes(name, indices, expected, (count,))


def values_are_checked(device: torch.device) -> bool:
    """Whether reading values is free (CPU) or was asked for; never while being compiled."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or _value_checks.get()


def check_label_values(labels: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Labels in [0, C) or `ignore_index`; reads them, and names the first row that is wrong."""
    if labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low >= 0 and high < num_classes:
        return
    wrong = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        allowed = f"class indices in [0, {num_classes})"
        remedy = "remap the labels, or give the head one row for each class"
        if ignore_index is not None:
            allowed += f" or ignore_index={ignore_index}"
            remedy += ", or pass the value to leave out as ignore_index"
        raise argument_error("labels", allowed, f"{int(labels[row])} at row {row}", remedy)


def check_finite(name: str, tensor: Tensor, remedy: str) -> None:
    """No NaN and no infinity; reads the tensor, and names the first place that is wrong."""
    if math.isfinite(tensor.sum(dtype=torch.float64)):  # one pass; a sum of finite may overflow
        return
    if not torch.isfinite(tensor).all():
        place = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
        value = float(tensor[place])
        raise argument_error(name, "finite numbers", f"{value} at index {place}", remedy)


def check_finite_features(features: Tensor, dtype: torch.dtype) -> None:
    """Finite at the statistics' dtype: others would spoil Σ for good."""
    remedy = (
        "look at the inputs; if they are fine, training has diverged: go back to a state before, "
        "and lower lr or alpha, clip the gradient (torch.nn.utils.clip_grad_norm_), or let alpha "
        "rise from 0"
    )
    check_finite("features", features.detach().to(dtype), remedy)


def _is_finite(value: float) -> bool:
    """As math.isfinite, of which torch.compile makes no graph where the number may change."""
    return value - value == 0


def check_number(name: str, value: float, least: float = -math.inf, remedy: str = "") -> None:
    """A plain finite number; tensors are refused because reading one waits for its device."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise argument_error(name, "a finite Python number", repr(value), f"pass float({name})")
    if value < least:
        raise argument_error(name, f"a number from {least:g} on", repr(value), remedy)


def check_weights(
    name: str, weights: Tensor, count: int, kind: str = "class", always: bool = False
) -> None:
    """One of each class, or row, not negative: where values are checked, or `always`."""
    expected = f"a floating-point tensor ({count},), one weight for each {kind}, not negative"
    check_float(name, weights, expected, (count,))
    if count and not weights.is_meta and (always or values_are_checked(weights.device)):
        check_finite(name, weights.detach(), "look at how it is made")
        if weights.min() < 0:
            raise argument_error(name, expected, f"{float(weights.min())}", "pass 0 to leave out")


def check_batch_values(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, dtype: torch.dtype
) -> None:
    """Labels in range and features finite at the statistics' `dtype`, where values are checked."""
    if not values_are_checked(features.device):
        return
    check_label_values(labels.long(), num_classes, ignore_index)
    check_finite_features(features, dtype)


def check_loss_arguments(inputs: LossInputs, options: LossOptions, streams: bool = False) -> None:
    """Everything that `fused_loss` and `eager_loss` ask of their arguments, features (N, A).

    With `streams`, which needs a covariance, what `check_batch_values` asks of features as well.
    """
    if (
        type(options.alpha) in (float, int)
        and type(options.beta) in (float, int)
        and _is_finite(options.alpha + options.beta)
        and type(options.ignore_index) is int
        and options.reduction in REDUCTIONS
        and type(options.label_smoothing) is float
        and 0.0 <= options.label_smoothing < 1.0
        and not torch.compiler.is_compiling()
        and native.arguments_fit(inputs, options.ignore_index, streams)
    ):
        return
    if isinstance(inputs.weight, Tensor) and inputs.weight.shape[:1] == (0,):
        raise argument_error("weight", "at least one class", "shape (0, A)", "give the head rows")
    check_loss_tensors(inputs)
    check_loss_options(options)
    features, epsilon, covariance = inputs.features, inputs.epsilon, inputs.covariance
    if not values_are_checked(features.device):
        return
    check_label_values(inputs.labels.long(), len(inputs.weight), options.ignore_index)
    if epsilon is not None:
        remedy = "look at the perturbation network's output; its tanh cannot give this"
        check_finite("epsilon", epsilon.detach(), remedy)
    if inputs.log_prior is not None:
        check_is_log(inputs.log_prior.detach().double())
    if streams and covariance is not None:
        check_finite_features(features, covariance.dtype)


def check_is_log(log_prior: Tensor) -> None:
    """log π (C), which any constant may be added to, and not π."""
    if len(log_prior) > 1 and log_prior.min() >= 0 and abs(float(log_prior.sum()) - 1) < 1e-3:
        got, remedy = "numbers from 0 on that add up to 1: π", "pass their log()"
        raise argument_error("log_prior", f"log π ({len(log_prior)},)", got, remedy)


def check_loss_tensors(inputs: LossInputs) -> None:
    """Shapes, dtypes and devices, one after the other."""
    check_float("features", inputs.features, "a floating-point tensor (…, A)", (None, None))
    count, width = inputs.features.shape
    weight, bias = inputs.weight, inputs.bias
    if (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.shape[1] != width == len(weight)
        and isinstance(bias, Tensor)
        and bias.shape == (width,)
    ):
        remedy = "pass the input of the last layer, not its output"
        expected = f"(…, {weight.shape[1]}), as the head's weight {tuple(weight.shape)} takes them"
        raise argument_error("features", expected, f"logits (…, {width})", remedy)
    check_float("weight", inputs.weight, f"a floating-point tensor (C, {width})", (None, width))
    num_classes = len(inputs.weight)
    check_labels(inputs.labels, count)
    covariance, epsilon = inputs.covariance, inputs.epsilon
    if bias is not None:
        check_float("bias", bias, f"a floating-point tensor ({num_classes},)", (num_classes,))
    if covariance is not None:
        check_covariance(covariance, num_classes, width)
    if epsilon is not None:
        expected = f"a floating-point tensor ({count},), one strength for each row of features"
        check_float("epsilon", epsilon, expected, (count,))
    if inputs.log_prior is not None:
        expected = f"a floating-point tensor ({num_classes},), one log prior for each class"
        check_float("log_prior", inputs.log_prior, expected, (num_classes,))
    for name in ("weight", "bias", "labels", "covariance", "epsilon", "log_prior"):
        if getattr(inputs, name) is not None:
            check_device(name, getattr(inputs, name), inputs.features.device, "features")


def check_loss_options(options: LossOptions) -> None:
    """Numbers and names, of the call or of the module."""
    check_number("alpha", options.alpha)
    check_number("beta", options.beta)
    if type(options.ignore_index) is not int:
        got = repr(options.ignore_index)
        raise argument_error("ignore_index", "an int", got, "pass -100 to ignore nothing")
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_number("label_smoothing", options.label_smoothing)
    if not 0 <= options.label_smoothing < 1:
        got = repr(options.label_smoothing)
        raise argument_error("label_smoothing", "a number in [0, 1)", got, "0.1 is usual")


def check_covariance(covariance: Tensor, num_classes: int, width: int) -> None:
    """float32 or float64, full (C, A, A) or its triangles, diagonal (C, A) or (C, (1 + r) A)."""
    full, diagonal = (num_classes, width, width), (num_classes, width)
    triangles = (num_classes, *triangular_shape(width))
    expected = f"a float32 or float64 tensor {full} (full) or {diagonal} (diagonal)"
    check_tensor("covariance", covariance, f"{expected} or an iada.ClassCovariance")
    if covariance.dtype not in (torch.float32, torch.float64):
        remedy = "keep statistics in float32: covariance.float()"
        raise argument_error("covariance", expected, f"dtype {covariance.dtype}", remedy)
    shape = tuple(covariance.shape)
    packed = len(shape) == 2 and width and shape[1] and shape[1] % width == 0
    if shape not in (full, triangles, diagonal) and not (packed and shape[0] == num_classes):
        remedy = f"build it with iada.ClassCovariance({num_classes}, {width})"
        raise argument_error("covariance", expected, f"shape {shape}", remedy)
