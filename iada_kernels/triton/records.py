"""What several kernels take, as records: Triton passes a NamedTuple's fields as arguments.

Each field is specialised as if it were an argument of its own: pointers and sizes by divisibility
by 16, and None, for what is absent, as a constant. In kernels a record is Triton's own tuple, so
that no field can be called `values` or `type`; no argument of a kernel can be called `stream`. A
record that a kernel compares with None must have no None among its fields: Triton 3.6 cannot. Nor
one that holds records with sizes in them: behind a branch it forgets those that are 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.layout import contiguous_as, unit_inner_stride


def as_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a product: neighbours along the last axis side by side, and float64 where `dtype` is.

    Triton 3.6 compiles no product of float64 whose operands a kernel converts; others it does.
    """
    return unit_inner_stride(tensor.to(dtype) if dtype == torch.float64 else tensor)


def sign_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of s, an operand too, where sums are of `dtype`."""
    return dtype if dtype == torch.float64 else torch.int8


class Sizes(NamedTuple):
    """N samples, C classes, A features."""

    N: int
    C: int
    A: int

    @classmethod
    def of(cls, inputs: LossInputs) -> "Sizes":
        return cls(inputs.labels.numel(), *inputs.weight.shape)


class Labels(NamedTuple):
    """The class of each sample (N) int64, contiguous, and the label of samples left out."""

    classes: Tensor
    ignore_index: int

    @classmethod
    def of(cls, inputs: LossInputs, options: LossOptions) -> "Labels":
        return cls(inputs.labels.contiguous(), options.ignore_index)


class Samples(NamedTuple):
    """h, or h + ε s where a sign is given: `device.load_samples` reads it."""

    features: Tensor  # (N, A) of any float
    stride: int  # elements from one row to the next
    epsilon: Tensor | None  # (N)
    sign: Tensor | None  # (N, A) of `sign_dtype`

    @classmethod
    def plain(cls, features: Tensor, dtype: torch.dtype) -> "Samples":
        """Without ε, where sums are of `dtype`."""
        features = as_operand(features, dtype)
        return cls(features, features.stride(0), None, None)

    @classmethod
    def of(cls, inputs: LossInputs, sign: Tensor | None) -> "Samples":
        """With ε in the compute dtype, where there is a sign."""
        samples = cls.plain(inputs.features, inputs.compute_dtype)
        if sign is None:
            return samples
        epsilon = contiguous_as(inputs.epsilon, inputs.compute_dtype)
        return samples._replace(epsilon=epsilon, sign=sign)


class Diagonal(NamedTuple):
    """A diagonal Σ, and the means over classes (A) that center what it multiplies."""

    variances: Tensor  # (C, A)
    weight_mean: Tensor
    tangent_mean: Tensor  # that of the weight where there is no tangent

    @classmethod
    def of(
        cls, inputs: LossInputs, weight: Tensor, tangent: Tensor | None = None
    ) -> "Diagonal | None":
        """None unless Σ is diagonal; in the dtype of `weight`, the compute dtype."""
        variances = contiguous_as(inputs.covariance, weight.dtype)
        if variances is None or variances.dim() == 3:
            return None
        mean = weight.mean(dim=0)
        return cls(variances, mean, mean if tangent is None else tangent.mean(dim=0))


class Table(NamedTuple):
    """R or Ṙ of a full Σ (C, C), whose rows may lie apart."""

    base: Tensor
    stride: int

    @classmethod
    def of(cls, table: Tensor | None) -> "Table | None":
        if table is None:
            return None
        # Of a single row any stride will do; Triton 3.6 loses one of 1 within a record of records.
        return cls(table, table.stride(0) if len(table) > 1 else 0)
