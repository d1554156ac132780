"""The passes as Triton kernels, for NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 they run on CPU tensors, slowly, so that anyone can check them.
"""

from iada_kernels.triton.characteristics import characteristics
from iada_kernels.triton.hypergradient import covariance_step, hypergradient
from iada_kernels.triton.loss import covariance_update, loss_backward, loss_forward

__all__ = [
    "characteristics",
    "covariance_step",
    "covariance_update",
    "hypergradient",
    "loss_backward",
    "loss_forward",
]
