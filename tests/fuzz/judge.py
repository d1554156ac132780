"""How large an error may be: at most FACTOR times that of torch's own operators at that dtype.

All errors are against the definition in float64, in the max norm of each tensor. Torch computes
each case in several ways (the eager form, the definition at that dtype, the same with rows, classes
and features in another order), of which the worst counts. They may all be exact by luck, so the
unit is no less than what a single rounding of each input and each logit does to the exact result,
which is measured, and a unit in the last place of the largest number.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 4


@dataclass(frozen=True)
class Judged:
    """One tensor of one case: our error, torch's, and what rounding explains."""

    name: str
    error: float
    torch_error: float
    rounding: float

    @property
    def ratio(self) -> float:
        """Our error in units of the larger of the others; more than FACTOR is a failure."""
        if self.error == 0:
            return 0.0
        unit = max(self.torch_error, self.rounding)
        return self.error / unit if unit > 0 else math.inf

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.2e}, {self.ratio:.2f} of the larger of torch's "
            f"{self.torch_error:.2e} and rounding's {self.rounding:.2e}"
        )


def judged(
    name: str, ours: Tensor, torch_ways: list[Tensor], exact: Tensor, nudged: list[Tensor]
) -> Judged:
    """`ours` and `torch_ways` in the dtype of the result; `exact` and `nudged` in float64."""
    assert torch.isfinite(exact).all(), f"{name}: the exact result is not finite"
    dtype = ours.dtype
    if ours.shape != exact.shape or any(way.dtype != dtype for way in torch_ways):
        return broken(f"{name}: {dtype} {tuple(ours.shape)}, torch has another dtype or shape")
    own = max(distance(way, exact, dtype) for way in torch_ways)
    info, size = torch.finfo(dtype), largest(exact)
    # Below the smallest normal number nothing that leads to the result keeps its digits.
    computed = torch.finfo(torch.promote_types(dtype, torch.float32))
    last_place = max(size * info.eps, info.smallest_normal * info.eps, computed.smallest_normal)
    rounding = max([last_place, *(distance(other, exact, dtype) for other in nudged)])
    if dtype == torch.float64:  # the exact result is of float64 too, and rounded as often
        rounding *= 2
    own = own if math.isfinite(own) else 0.0  # torch's own NaN excuses nothing
    return Judged(name, distance(ours, exact, dtype), own, rounding)


def holds(name: str, condition: bool) -> Judged:
    """What has to be so exactly."""
    return Judged(name, 0.0 if condition else math.inf, 0.0, 0.0)


def broken(name: str) -> Judged:
    return Judged(name, math.inf, 0.0, 0.0)


def distance(have: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The largest difference; what `dtype` cannot hold counts as its largest number, NaN as ∞."""
    limit = torch.finfo(dtype).max
    difference = have.double().clamp(-limit, limit) - want.double().clamp(-limit, limit)
    return largest(difference.nan_to_num(nan=math.inf))


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
