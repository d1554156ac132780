"""The closed forms on torch operators: every device, every dtype, no kernel to build."""

from iada_kernels.closed_form.characteristics import characteristics
from iada_kernels.closed_form.covariance import covariance_update
from iada_kernels.closed_form.hypergradient import covariance_step, hypergradient
from iada_kernels.closed_form.loss import loss_backward, loss_differentiable, loss_forward

__all__ = [
    "characteristics",
    "covariance_step",
    "covariance_update",
    "hypergradient",
    "loss_backward",
    "loss_differentiable",
    "loss_forward",
]
