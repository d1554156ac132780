"""The passes as Triton kernels, for NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 they run on CPU tensors, slowly, so that anyone can check them.
"""

from iada_kernels.triton.operators import (
    characteristics,
    covariance_step,
    covariance_step_bound,
    covariance_update,
    hypergradient,
    loss_backward,
    loss_forward,
)

__all__ = [
    "characteristics",
    "covariance_step",
    "covariance_step_bound",
    "covariance_update",
    "hypergradient",
    "loss_backward",
    "loss_forward",
]
