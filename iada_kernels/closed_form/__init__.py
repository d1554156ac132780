"""The closed forms on torch operators: every device, every dtype, no kernel to build."""

from iada_kernels.closed_form.covariance import covariance_update
from iada_kernels.closed_form.loss import loss_backward, loss_differentiable, loss_forward

__all__ = ["covariance_update", "loss_backward", "loss_differentiable", "loss_forward"]
