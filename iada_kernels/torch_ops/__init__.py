"""backend="torch": closed forms on torch operators, for every device and dtype."""

from iada_kernels.torch_ops.characteristics import characteristics
from iada_kernels.torch_ops.covariance import covariance_update
from iada_kernels.torch_ops.hypergradient import (
    covariance_step,
    covariance_step_bound,
    hypergradient,
)
from iada_kernels.torch_ops.loss import loss_backward, loss_differentiable, loss_forward

__all__ = [
    "characteristics",
    "covariance_step",
    "covariance_step_bound",
    "covariance_update",
    "hypergradient",
    "loss_backward",
    "loss_differentiable",
    "loss_forward",
]
