"""The IADA loss as people call it: `fused_loss`, a function, and `IADALoss`, a module."""

import torch
from torch import Tensor, nn

from iada.nn.autograd import IADALossFunction
from iada.nn.class_covariance import ClassCovariance
from iada.nn.priors import log_class_prior
from iada.utils.autocast import full_precision
from iada.utils.checks import check_loss_arguments
from iada_kernels.contract import ClassStatistics, LossOptions
from iada_kernels.dispatch import select_backend


def fused_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    covariance: Tensor | ClassCovariance | None,
    epsilon: Tensor | None = None,
    log_prior: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The IADA loss (Eq. 6) of a linear head, without N×C×A or N×A×A temporaries.

        z̃_j = w_j·(h + ε s) + b_j + α ½ (w_j − w_y)ᵀ Σ_y (w_j − w_y) + β log π_j
        loss = CE(z̃, y),   s = sign(∇_h CE(Wh + b, y)), a constant

    Same value, gradients and errors as `eager_loss`; gradients flow to every floating tensor,
    to any order. ε = 0 and β = 0 is ISDA; Σ = None and ε = None is Logit Adjustment.

    Args:
        features: last-layer features h, (N, A), float16, bfloat16, float32 or float64.
        weight: the head's weight W, (C, A).
        bias: the head's bias b, (C), or None.
        labels: class indices y, (N), any integer dtype.
        covariance: Σ, symmetric: (C, A, A), its diagonals (C, A), an `iada.ClassCovariance`, or
            None for 0. float32 or float64.
        epsilon: perturbation strength ε of each row, (N), in units of the features; None for 0.
            The paper keeps it in (−1, 1); larger values are allowed.
        log_prior: log π, (C), or None for no adjustment.
        alpha: weight of the quadratic term; a Python number, so that it can be annealed freely.
        beta: weight of the log prior.
        ignore_index: rows with this label count for nothing, in the mean neither.
        reduction: "mean" (over the rows not ignored; 0 if there are none), "sum" or "none".
        backend: "torch", "native", "triton", or None for the best one for the device.

    Returns:
        The loss in nats, float64 if any argument is float64 and else float32: () or, with
        reduction="none", (N). Computed at that precision, under autocast too.

    Raises:
        ValueError: an argument does not fit; the message names it and the remedy. Label range and
            finite epsilon are checked on CPU, elsewhere inside `iada.value_checks()`.
        RuntimeError: the named backend is not in this build.
    """
    owner = None
    if isinstance(covariance, ClassCovariance):
        owner, covariance = covariance, covariance.covariance
    check_loss_arguments(
        features,
        weight,
        bias,
        labels,
        covariance,
        epsilon,
        log_prior,
        alpha,
        beta,
        ignore_index,
        reduction,
    )
    passes = select_backend(backend, features.device, features.dtype)
    options = LossOptions(float(alpha), float(beta), ignore_index, reduction)
    tensors = (features, weight, bias, labels.long(), covariance, epsilon, log_prior)
    with full_precision(features.device):
        return IADALossFunction.apply(options, passes, None, _lender(owner), *tensors)


def _lender(owner: ClassCovariance | None) -> ClassCovariance | None:
    """None where there is no backward, and under torch.compile, which makes no change in place."""
    wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return owner if wanted else None


class IADALoss(nn.Module):
    """The loss with the state it needs: class covariance and log prior.

    In training mode each call first streams the batch's detached features into the covariance; loss
    and update are one call of the backend. Several calls before one `backward`, as for a sum of
    losses, cost a copy of Σ for each but the last; with a `backward` after each nothing is copied.

    Args:
        num_classes: C.
        num_features: A.
        class_counts: training samples of each class, (C), from which π follows; None for no
            adjustment.
        structure: "full" or "diag", see `ClassCovariance`.
        alpha, beta, ignore_index, reduction, backend: as in `fused_loss`. alpha and beta are plain
            attributes, to be annealed.
    """

    log_prior: Tensor | None

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        class_counts: Tensor | None = None,
        structure: str = "full",
        alpha: float = 0.5,
        beta: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.covariance = ClassCovariance(num_classes, num_features, structure)
        prior = None if class_counts is None else log_class_prior(class_counts, num_classes)
        self.register_buffer("log_prior", prior)
        self.alpha, self.beta = alpha, beta
        self.ignore_index, self.reduction = ignore_index, reduction
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        epsilon: Tensor | None = None,
    ) -> Tensor:
        """Eq. 6 for features (N, A), the head's weight (C, A) and bias (C), labels (N)."""
        state = self.covariance
        sigma = state.covariance
        arguments = (features, weight, bias, labels, sigma, epsilon, self.log_prior)
        alpha, beta, ignore, reduction = self.alpha, self.beta, self.ignore_index, self.reduction
        check_loss_arguments(*arguments, alpha, beta, ignore, reduction, streams=self.training)
        options = LossOptions(float(alpha), float(beta), ignore, reduction)
        stream = None
        if self.training:
            state.settle()
            stream = ClassStatistics(state.mean, state.count)
        passes = select_backend(self.backend, features.device, features.dtype)
        tensors = (features, weight, bias, labels.long(), sigma, epsilon, self.log_prior)
        with full_precision(features.device):
            return IADALossFunction.apply(options, passes, stream, _lender(state), *tensors)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, reduction={self.reduction!r}"
