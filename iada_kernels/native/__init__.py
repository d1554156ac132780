"""The passes in C++ for CPU tensors: the same contract as `closed_form`, one operator a pass.

The covariance is read as symmetric, as the contract says it is. Scratch is bounded by a few
blocks for each thread and 16 MiB of products in float32, whatever the shape. Only classes that occur in the
batch cost anything. Results do not depend on the number of threads.
"""

from iada_kernels.native.covariance import covariance_update
from iada_kernels.native.library import instruction_set, is_available
from iada_kernels.native.loss import loss_backward, loss_forward

__all__ = [
    "covariance_update",
    "instruction_set",
    "is_available",
    "loss_backward",
    "loss_forward",
]
