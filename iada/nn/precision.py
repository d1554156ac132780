"""Modules whose numbers stay at float32 or better when the model around them is cast."""

from collections.abc import Callable

from torch import Tensor, finfo, nn


class KeepsPrecision(nn.Module):
    """.half() and .bfloat16(), of it or of a module that it is in, leave its state as precise.

    Parameters and buffers, those of its submodules too, still move to other devices, and to float64
    and back.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and finfo(moved.dtype).bits < 32:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)
