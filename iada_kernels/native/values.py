"""A quick look at the arguments of the loss, for the checks that every call on a CPU gets."""

import torch
from torch import Tensor

from iada_kernels.native import library

if library.is_available():
    _arguments_fit = torch.ops.iada_native.arguments_fit.default


def arguments_fit(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    covariance: Tensor | None,
    epsilon: Tensor | None,
    log_prior: Tensor | None,
    ignore_index: int,
    streams: bool,
) -> bool:
    """Whether these are CPU tensors as `LossInputs` wants them, with values that fit.

    Labels in [0, C) or `ignore_index`, epsilon finite, and with `streams` the features too. False
    where it cannot tell as well: for arguments of any other kind, dtype, layout or device.
    """
    if not library.is_available():
        return False
    tensors = (features, weight, bias, labels, covariance, epsilon, log_prior)
    try:
        return _arguments_fit(*tensors, ignore_index, streams)
    except (RuntimeError, TypeError):  # not tensors, or not on a CPU
        return False
