"""Tensors in the layout and dtype that kernels read."""

import torch
from torch import Tensor


def contiguous_as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous and of `dtype`; itself where it is that already."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def unit_inner_stride(tensor: Tensor) -> Tensor:
    """`tensor` if neighbours along its last axis are neighbours in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
