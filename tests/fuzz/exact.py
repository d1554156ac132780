"""The exact results, in float64, and what a single rounding of everything would do to them.

softmax(z) − onehot(y) loses what 1 − p_y is made of, in float64 too, so that the definition is no
oracle of confident samples. Here the loss is softplus(logsumexp_{j≠y}(z_j − z_y)), whose gradients
autograd finds without a cancellation.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from iada_kernels import reference
from tests.fuzz.draw import Draw, compute_dtype
from tests.helpers.problems import Problem, cotangent, sign_argument, target_of

NUDGES = 8  # the worst of so many random roundings counts

ExactLoss = Callable[[Problem, Draw | None, float], Tensor]


def exact_gradients(
    problem: Problem,
    wanted: list[str],
    scale: float,
    nudge: Draw | None = None,
    dtype: torch.dtype | None = None,
    loss_of: ExactLoss | None = None,
) -> dict[str, Tensor]:
    """The loss, and the gradients of the tensors `wanted` for `scale` times `cotangent`."""
    eps = torch.finfo(dtype or compute_dtype(problem)).eps
    p = problem.double()
    leaves = {name: getattr(p, name).detach().clone().requires_grad_() for name in wanted}
    loss = (loss_of or _loss)(rounded_inputs(replace(p, **leaves), nudge, eps), nudge, eps)
    found = {"loss": loss.detach()}
    if leaves:
        upstream = scale * cotangent(loss.detach())
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
        found |= {name: grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    return found


def exact_hypergradient(
    problem: Problem,
    directions: tuple[Tensor | None, ...],
    nudge: Draw | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """How the loss's derivative along (ḣ, V, v_b) depends on ε and Σ, by differentiating twice."""
    eps = torch.finfo(dtype or compute_dtype(problem)).eps
    p = problem.double().map(lambda t: t.detach().clone().requires_grad_())
    r = rounded_inputs(p, nudge, eps)
    loss, z = exact_loss(r, nudge, eps)
    moving = dict(zip(("features", "weight", "bias"), directions, strict=True))
    moving = {name: about(t.double(), nudge, eps) for name, t in moving.items() if t is not None}
    first = torch.autograd.grad(loss, [getattr(p, name) for name in moving], create_graph=True)
    derivative = sum((g * v).sum() for g, v in zip(first, moving.values(), strict=True))
    if nudge is not None:  # Σ_ij D_ij ż_ij with the terms of each ż_ij rounded once
        (residual,) = torch.autograd.grad(loss, z, create_graph=True)
        terms = tangent_terms(r, moving)
        derivative = derivative + sum((residual * rounding(t, nudge, eps)).sum() for t in terms)
        # and the mean of ż, which the derivative of softmax subtracts.
        q, tangent = z.detach().softmax(dim=1), sum(terms).detach()
        mean = (q * tangent).sum(dim=1, keepdim=True)
        derivative = derivative + (q * z * rounding(mean, nudge, eps) * share_of_rows(p)).sum()
    wanted = [name for name in ("epsilon", "covariance") if getattr(p, name) is not None]
    if not wanted:
        return {}
    found = torch.autograd.grad(
        derivative, [getattr(p, name) for name in wanted], allow_unused=True, materialize_grads=True
    )
    return {name: about(t, nudge, eps) for name, t in zip(wanted, found, strict=True)}


def exact_characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """The definition, but for the loss and the entropy, which need log p_j close to 0."""
    found = reference.batch_characteristics(features, logits, labels, weight, neighbours)
    if not len(labels):
        return found
    log_p = exact_log_softmax(logits)
    found[:, 0] = -log_p.gather(1, labels[:, None])[:, 0]
    found[:, 4] = -(log_p.exp() * log_p).sum(dim=1)
    return found


def rounded_characteristics(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, int], nudge: Draw, eps: float
) -> Tensor:
    """As if every input, every probability and every result had been rounded once."""
    features, logits, labels, weight, neighbours = arguments
    inputs = [about(t.double(), nudge, eps) for t in (features, logits, weight)]
    found = exact_characteristics(inputs[0], inputs[1], labels, inputs[2], neighbours)
    two_shares = 2 * found[:, 6] - found[:, 1]  # what column 1 is the difference of, added
    found = about(found, nudge, eps)
    found[:, 1] += rounding(two_shares, nudge, eps)
    return found


def exact_loss(p: Problem, nudge: Draw | None, eps: float) -> tuple[Tensor, Tensor]:
    """And z̃ (N, C), of a problem in float64; with `nudge` each term of a logit and each row's
    loss is rounded once.
    """
    target = target_of(p)
    sign = None
    if p.epsilon is not None:
        sign = sign_argument(p.map(Tensor.detach)).sign() * (len(p.weight) > 1)
    z = reference.adjusted_logits(*replace(p, labels=target).records(), sign)
    if nudge is not None:
        z = z + sum(rounding(term, nudge, eps) for term in logit_terms(p))
    others = (z - z.gather(1, target[:, None])).scatter(1, target[:, None], -torch.inf)
    others = others.clamp(min=-1e300)  # of none at all, or of −∞ alone, there is no gradient
    losses, share = softplus(others.logsumexp(dim=1)), p.options.get("label_smoothing", 0.0)
    if share:
        losses = (1 - share) * losses - share * z.log_softmax(dim=1).mean(dim=1)
    losses = about(losses, nudge, eps)
    valid = p.labels.long() != p.options["ignore_index"]
    losses = torch.where(valid, losses, 0.0)
    if p.options["reduction"] == "none":
        return losses, z
    return losses.sum() / (valid.sum().clamp(min=1) if p.options["reduction"] == "mean" else 1), z


def _loss(p: Problem, nudge: Draw | None, eps: float) -> Tensor:
    return exact_loss(p, nudge, eps)[0]


def exact_soft_losses(p: Problem, shares: Tensor, nudge: Draw | None, eps: float) -> Tensor:
    """−Σ_j t_j log p_j of each row, (N), for `shares` t (N, C) of the classes."""
    z = reference.adjusted_logits(*replace(p, labels=target_of(p)).records(), None)
    if nudge is not None:
        z = z + sum(rounding(term, nudge, eps) for term in logit_terms(p))
    terms = about(shares, nudge, eps) * exact_log_softmax(z)
    return -torch.where(shares == 0, 0.0, terms).sum(dim=1)


def exact_log_softmax(z: Tensor) -> Tensor:
    """log p_j (N, C), close to 0 too; −1e300 and not −∞ where z_j is."""
    others = z[:, None, :] - z[:, :, None].clamp(min=-1e300)  # z_k − z_j
    diagonal = torch.eye(z.shape[1], dtype=torch.bool)
    return -softplus(others.masked_fill(diagonal, -torch.inf).clamp(min=-1e300).logsumexp(dim=2))


def share_of_rows(p: Problem) -> Tensor:
    """What each row counts for in the reduced loss, (N, 1)."""
    valid = (p.labels.long() != p.options["ignore_index"])[:, None].double()
    return valid / (valid.sum().clamp(min=1) if p.options["reduction"] == "mean" else 1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ); torch's own leaves the 1 out from x = 20 on, which float64 can tell."""
    return F.softplus(x, threshold=700)


def logit_terms(p: Problem) -> list[Tensor]:
    """What each z̃_ij is the sum of, (N, C), and differentiable as it is; products by their sizes,
    because their own sums may cancel.
    """
    terms = [p.features.abs() @ p.weight.abs().T]
    if p.bias is not None:
        terms.append(p.bias.expand_as(terms[0]))
    if p.epsilon is not None:
        terms.append(p.epsilon[:, None] * p.weight.abs().sum(dim=1))
    if p.covariance is not None:
        rho = reference.quadratic_forms(p.weight, p.covariance, target_of(p))
        terms.append(p.options["alpha"] * rho)
    if p.log_prior is not None:
        known = p.log_prior.masked_fill(p.log_prior == -torch.inf, 0.0)
        terms.append((p.options["beta"] * known).expand_as(terms[0]))
    return terms


def tangent_terms(p: Problem, moving: dict[str, Tensor]) -> list[Tensor]:
    """The same of ż̃ = W ḣ + V (h + ε s) + v_b + α Δ Σ (V − V_y)."""
    head = moving["weight"]
    terms = [p.features.abs() @ head.abs().T]
    if "features" in moving:
        terms.append(moving["features"].abs() @ p.weight.abs().T)
    if "bias" in moving:
        terms.append(moving["bias"].expand_as(terms[0]))
    if p.epsilon is not None:
        terms.append(p.epsilon[:, None] * head.abs().sum(dim=1))
    if p.covariance is not None:
        target = target_of(p)
        both, one, other = (
            reference.quadratic_forms(w, p.covariance, target)
            for w in (p.weight + head, p.weight, head)
        )
        terms.append(p.options["alpha"] * (both - one - other))
    return terms


def rounding(term: Tensor, nudge: Draw, eps: float) -> Tensor:
    return eps * nudge.sign(term) * term


def rounded_inputs(p: Problem, nudge: Draw | None, eps: float) -> Problem:
    """All but W, whose common offset has to cancel before anything is rounded."""
    changed = {n: about(t, nudge, eps) for n, t in p.floating().items() if n != "weight"}
    return replace(p, **changed)


def about_columns(features: Tensor, nudge: Draw | None, eps: float) -> Tensor:
    """As if each mean of the columns had been rounded once; what they spread is left alone."""
    if nudge is None or not len(features):
        return features
    return features * (1 + eps * nudge.sign(features[0]))


def about(tensor: Tensor, nudge: Draw | None, eps: float) -> Tensor:
    """As if each number had been rounded once, up or down."""
    return tensor if nudge is None else tensor * (1 + eps * nudge.sign(tensor))
