"""The IADA loss as a function, `fused_loss`."""

from torch import Tensor

from iada.nn.arguments import Extras, loss_of_rows
from iada.nn.autograd import IADALossFunction, lender
from iada.nn.class_covariance import ClassCovariance
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.dispatch import backend_for
from iada_kernels.low_rank import LowRankCovariance


def fused_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    covariance: Tensor | LowRankCovariance | ClassCovariance | None = None,
    epsilon: Tensor | None = None,
    log_prior: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_logits: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The IADA loss (Eq. 6) of a linear head, without N×C×A or N×A×A temporaries.

        z̃_j = w_j·(h + ε s) + b_j + α ½ (w_j − w_y)ᵀ Σ_y (w_j − w_y) + β log π_j
        loss = CE(z̃, y),   s = sign(∇_h CE(Wh + b, y)), a constant

    With none of covariance, epsilon and log_prior it is `F.cross_entropy(F.linear(features, weight,
    bias), labels)`; ε = None and β = 0 is ISDA; Σ = None and ε = None is Logit Adjustment. Same
    value, gradients and errors as `eager_loss`; gradients flow to every floating tensor but the
    weights of rows, to any order.

    With a diagonal Σ or none nothing of size N×C is held where that is large (above 2²⁴ and above
    N×A); but with label_smoothing or return_logits, under torch.compile, or with create_graph=True
    it is.

    Examples:
        >>> loss = iada.fused_loss(features, head.weight, head.bias, labels)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(head(features), labels))
        True

    Args:
        features: last-layer features h, (…, A), float16, bfloat16, float32 or float64; a map with
            its channels last. N below is the number of rows, all leading dimensions together.
        weight: the head's weight W, (C, A).
        bias: the head's bias b, (C), or None.
        labels: class indices y, (…), any integer dtype; or probabilities (…, C), floating, which
            take a log_prior but no covariance and no epsilon. One class a row: neither several
            labels nor regression.
        covariance: Σ, symmetric: (C, A, A), its diagonals (C, A), an `iada.LowRankCovariance` or
            an `iada.ClassCovariance`, or None for 0. float32 or float64. A low-rank Σ is served by
            torch operators, with gradients by its diagonal and its factors.
        epsilon: perturbation strength ε of each row, (…), in units of the features; None for 0.
            The paper keeps it in (−1, 1); larger values are allowed.
        log_prior: log π, (C), or None for no adjustment. With it the plain logits are learned for
            equally frequent classes; those of data with the shares π are z + β log π.
        alpha: weight of the quadratic term; a Python number, so that it can be annealed freely.
        beta: weight of the log prior.
        class_weight: of each class, (C), as F.cross_entropy's weight; a constant. Not beside
            label_smoothing with class indices.
        row_weight: of each row, (…); a constant. The mean is Σ w ℓ / Σ w over the rows. A row of
            weight 0 is left out, an infinite loss of it too.
        label_smoothing: in [0, 1), of the outer CE; served by torch operators.
        ignore_index: rows with this label are left out of the loss, and of the mean's count.
        reduction: "mean" (over the rows not ignored; 0 if there are none), "sum" or "none".
        return_logits: return (loss, z) with the plain logits z = Wh + b, (…, C), detached.
        backend: "torch", "native", "triton", or None for the best one for the device.

    Returns:
        The loss in nats, float64 if any argument but the weights of rows is float64 and else
        float32: () or, with reduction="none", (…). Computed at that precision, under autocast too.

    Raises:
        ValueError: an argument does not fit; the message names it and the remedy. Label range and
            finite epsilon are checked on CPU, elsewhere inside `iada.value_checks()`.
        RuntimeError: the named backend is not in this build.
    """

    owner = covariance if isinstance(covariance, ClassCovariance) else None

    def compute(inputs: LossInputs, options: LossOptions) -> Tensor:
        passes = backend_for(inputs, options, backend)
        return IADALossFunction.apply(options, passes, None, lender(owner), *inputs)

    inputs = LossInputs(features, weight, bias, labels, covariance, epsilon, log_prior)  # type: ignore[arg-type]
    options = LossOptions(alpha, beta, ignore_index, reduction, label_smoothing)
    return loss_of_rows(compute, inputs, options, Extras(class_weight, row_weight, return_logits))
