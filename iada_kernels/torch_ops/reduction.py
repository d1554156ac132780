"""From the losses of rows to the loss."""

from torch import Tensor

from iada_kernels.contract import LossOptions


def mean_divisor(ignored: Tensor, options: LossOptions) -> Tensor | None:
    """The number of rows that are not ignored, at least 1, for a mean; ignored: (N)."""
    if options.reduction != "mean":
        return None
    return (len(ignored) - ignored.sum()).clamp_(min=1)


def reduced(losses: Tensor, divisor: Tensor | None, options: LossOptions) -> Tensor:
    """The losses of rows (N), 0 where ignored, as `options.reduction` says."""
    if options.reduction == "none":
        return losses
    return losses.sum() if divisor is None else losses.sum() / divisor
