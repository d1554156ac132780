"""The regularisation terms G, R and F of Table 1, and a log of them during training.

To first order in what Eq. 6 adds to the logits, with q = softmax(Wh + b),

    CE(z̃, y) ≈ CE(z, y) + α G + R + β F
    G = Σ_{j≠y} q_j ρ_j        R = Σ_{j≠y} q_j (w_j − w_y)·δ        F = Σ_{j≠y} q_j log(π_j / π_y)

G is not negative for a positive semidefinite Σ. δ = ε sign(∇_h CE), and the sum in R is ∇_h CE: so
R = ε ‖∇_h CE‖₁ has the sign of ε. F is positive where the classes that y is taken for are larger.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iada.meta.method import MetaStep
from iada.utils.autocast import full_precision
from iada.utils.checks import check_count, check_loss_arguments
from iada.utils.evaluate import evaluating
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.torch_ops.blocking import blocks
from iada_kernels.torch_ops.loss import table_rows
from iada_kernels.torch_ops.quadratic import class_table

if TYPE_CHECKING:
    from iada.training.trainer import Trainer


class Terms(NamedTuple):
    """G, R and F of each sample, (N) in nats, without the factors α and β."""

    generalization: Tensor
    robustness: Tensor
    fairness: Tensor


@torch.no_grad()
def regularization_terms(inputs: LossInputs, ignore_index: int = -100) -> Terms:
    """Table 1 for each sample; inputs as of `iada.fused_loss`, None for a term that is 0.

    Rows with `ignore_index` have 0. No temporary of size N·C·A, no host synchronisation.
    """
    check_loss_arguments(inputs, LossOptions(ignore_index=ignore_index))
    features, weight, bias, labels = inputs[:4]
    covariance, epsilon, log_prior = inputs[4:]
    ignored = labels == ignore_index
    target = labels.long().masked_fill(ignored, 0)
    dtype = inputs.compute_dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    terms = [weight.new_zeros(len(labels)) for _ in Terms._fields]
    if len(weight) == 1:  # no class but the own
        return Terms(*terms)
    with full_precision(features.device):
        classes = table_rows(target, inputs)
        table = None if covariance is None else class_table(weight, covariance, classes)
        for rows in blocks(*features.shape):
            y = target[rows, None]
            z = F.linear(features[rows].to(dtype), weight, bias)
            others = z.scatter(1, y, -torch.inf)
            # q_j = (1 − q_y) r_j, r the softmax over the others; 1 − q_y written out would cancel.
            wrong = (others.logsumexp(dim=1) - z.gather(1, y)[:, 0]).sigmoid()
            r = others.softmax(dim=1)
            if table is not None:
                forms = table[target[rows]] if classes is None else table[rows]
                terms[0][rows] = wrong * torch.linalg.vecdot(r, forms)
            if epsilon is not None:
                slope = (r @ weight - weight[y[:, 0]]).abs().sum(dim=1)
                terms[1][rows] = epsilon[rows].to(dtype) * wrong * slope
            if log_prior is not None:
                prior = log_prior.to(dtype)
                terms[2][rows] = wrong * (r @ prior - prior[y[:, 0]])
    return Terms(*(term.masked_fill_(ignored, 0.0) for term in terms))


class TermsLog:
    """Means of G, R and F in each epoch after plain CE: an `observe` callback of `iada.Trainer`.

    >>> log = TermsLog()
    >>> iada.Trainer(..., observe=log).fit()
    >>> log.summary()

    Every so many steps it looks at the batch that was just trained on, in evaluation mode: one
    forward without gradient, random state and BatchNorm statistics left alone. ε is that of the
    step, 0 for methods without; Σ and π are the method's, and so are features that its loss moves.
    Sums stay on the device until `summary`. With several processes, over this one's rows.

    Args:
        every: steps from one look to the next, counted from each epoch's first.
    """

    def __init__(self, every: int = 20) -> None:
        check_count("every", every, remedy="1 looks at every step")
        self.every = every
        self._sums: dict[int, Tensor] = {}  # epoch → sums of G, R, F and the rows, (4)

    @torch.no_grad()
    def __call__(self, trainer: "Trainer", batch: Sequence[Any], result: Any) -> None:
        """Take in one step."""
        if trainer.plain_phase or trainer.batch % self.every:
            return
        inputs, labels = batch[0], batch[1]
        head, method = trainer.head, trainer.method
        with evaluating(trainer.backbone, head):
            features = trainer.backbone(inputs)
        features, covariance = method.seen_by_loss(features, labels)
        epsilon = result.epsilon if isinstance(result, MetaStep) else None
        given = LossInputs(features, head.weight, head.bias, labels, covariance, epsilon)
        terms = regularization_terms(given._replace(log_prior=getattr(method, "log_prior", None)))
        rows = torch.full_like(terms.fairness[:1], len(labels))
        found = torch.cat([torch.stack([term.sum() for term in terms]), rows])
        before = self._sums.get(trainer.epoch)
        self._sums[trainer.epoch] = found if before is None else before.to(found) + found

    def summary(self) -> list[dict[str, float]]:
        """One dict an epoch that was seen: epoch, generalization, robustness, fairness."""
        found = []
        for epoch, sums in sorted(self._sums.items()):
            *terms, rows = sums.tolist()
            means = {name: value / rows for name, value in zip(Terms._fields, terms, strict=True)}
            found.append({"epoch": epoch, **means})
        return found

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, to be saved beside the trainer's checkpoint."""
        return {"sums": {epoch: sums.cpu() for epoch, sums in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums = dict(state["sums"])
