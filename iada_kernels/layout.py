"""Tensors in the layout and dtype that kernels read."""

from typing import TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def contiguous_as(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """Contiguous and of `dtype`; itself where it is that already."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def unit_inner_stride(tensor: Tensor) -> Tensor:
    """`tensor` if neighbours along its last axis are neighbours in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
