"""The fast path of the checks that every call of the loss on a CPU gets."""

import torch

from iada_kernels.contract import LossInputs
from iada_kernels.native import library

if library.is_available():
    _arguments_fit = torch.ops.iada_native.arguments_fit.default


def arguments_fit(inputs: LossInputs, ignore_index: int, streams: bool) -> bool:
    """Whether these are CPU tensors as `LossInputs` wants them, with values that fit.

    Labels in [0, C) or `ignore_index`, epsilon finite, and with `streams` the features too. False
    where it cannot tell as well: for arguments of any other kind, dtype, layout or device.
    """
    if not library.is_available():
        return False
    try:
        return _arguments_fit(*inputs, ignore_index, streams)
    except (RuntimeError, TypeError):  # not tensors, or not on a CPU
        return False
