"""The passes in C++ for CPU tensors: the same contract as `torch_ops`, one operator a pass.

Only classes that occur in the batch cost anything. Results do not depend on the number of threads.
A head of more than 2^18 weights without a full Σ goes to `torch_ops`, for the loss and the
hypergradient, under backend="native" too: the work is in dense products then, which are torch's.

Scratch, whatever the shape: a few blocks for each thread, 4 Mi elements of products, 16 gradients
of W, W padded and transposed; for the characteristics a copy of the features; for a gradient by a
full Σ two matrices of W's size for each thread.
"""

from iada_kernels.native.batch import arguments_fit, characteristics, covariance_update
from iada_kernels.native.hypergradient import covariance_step, covariance_step_bound, hypergradient
from iada_kernels.native.library import instruction_set, is_available
from iada_kernels.native.loss import loss_backward, loss_forward

__all__ = [
    "arguments_fit",
    "characteristics",
    "covariance_step",
    "covariance_step_bound",
    "covariance_update",
    "hypergradient",
    "instruction_set",
    "is_available",
    "loss_backward",
    "loss_forward",
]
