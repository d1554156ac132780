"""What the front doors add to Eq. 6: weights of rows and of classes, probabilities as labels,
leading dimensions, and the logits on request.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import iada
from tests.fuzz.draw import DTYPES, Draw, compute_dtype, draw_problem
from tests.fuzz.exact import NUDGES, about, exact_gradients, exact_loss, exact_soft_losses
from tests.fuzz.judge import Judged, holds
from tests.fuzz.loss import (
    Found,
    as_defined,
    compared,
    gradients,
    ignored_are_zero,
    in_another_order,
    unchanged_after,
)
from tests.helpers.problems import Problem, eager, lay_out


@dataclass(frozen=True)
class Door:
    """A call's arguments beside those of Eq. 6."""

    reduction: str
    class_weight: Tensor | None
    row_weight: Tensor | None
    shares: Tensor | None  # (N, C), in place of the problem's labels
    smoothing: float
    leading: tuple[int, ...]


def fuzz_front_door(draw: Draw, backend: str, device: torch.device) -> list[Judged]:
    problem = draw_problem(draw, draw.choice((None, "full", "diag", "low-rank")))
    problem, door = draw_door(draw, problem)
    wanted = [name for name in problem.floating() if draw.chance(0.6)]
    scale = draw.choice((1.0, 1.0, 65536.0, 1e-3))
    logits: list[Tensor] = []

    def ours(moved: Problem) -> Tensor:
        loss, z = call(moved, door, device, backend)
        logits.append(z.detach())
        return loss

    moved = problem.to(device)
    beside = [t for t in (door.class_weight, door.row_weight, door.shares) if t is not None]
    is_unchanged = unchanged_after([*moved.tensors(), *beside])
    found = {k: t.cpu() for k, t in gradients(ours, moved, wanted, scale).items()}
    shape = door.leading if door.reduction == "none" else ()
    checks = [
        holds("no argument is changed", is_unchanged()),
        holds("shape of the loss", found["loss"].shape == shape),
        holds("shape of the logits", logits[0].shape == (*door.leading, len(problem.weight))),
    ]
    found["logits"] = logits[0].cpu().flatten(0, -2) if door.leading else logits[0].cpu()[None]
    exact, *nudged = (
        exactly(problem, door, wanted, scale, nudge) for nudge in (None, *[draw] * NUDGES)
    )
    ways = torch_ways(draw, problem, door, wanted, scale)
    found, exact = flat(found), flat(exact)
    checks += compared(found, [flat(way) for way in ways], exact, [flat(way) for way in nudged])
    if door.shares is None:
        reduced = problem.with_options(reduction=door.reduction)
        checks += ignored_are_zero(reduced, found)
    return checks


def flat(found: Found) -> Found:
    """A loss of rows as (N), whatever the leading dimensions."""
    return found | {"loss": found["loss"].reshape(-1)}


def draw_door(draw: Draw, problem: Problem) -> tuple[Problem, Door]:
    """And the problem as the door allows it, its reduction taken over by the door."""
    rows, classes = len(problem.features), len(problem.weight)
    reduction, shares = problem.options["reduction"], None
    problem = problem.with_options(reduction="none")
    if draw.chance(0.3):
        problem = replace(problem, covariance=None, epsilon=None)
        problem = problem.with_options(ignore_index=-100)
        # What is drawn for ignored rows may be huge, and here none is ignored.
        problem = replace(problem, labels=torch.zeros(rows, dtype=torch.int64))
        shares = draw_shares(draw, problem)
    return problem, Door(
        reduction,
        draw_weights(draw, classes),
        draw_weights(draw, rows),
        shares,
        0.1 if shares is not None and finite(problem.log_prior) and draw.chance(0.3) else 0.0,
        draw_leading(draw, rows),
    )


def finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())


def draw_weights(draw: Draw, count: int) -> Tensor | None:
    """Of any dtype and size, some 0, now and then all of them."""
    if draw.chance(0.3):
        return None
    weights = draw.uniform(count) ** 3 * draw.choice((1, 1, 0.01, 100))
    weights[draw.uniform(count) < draw.choice((0, 0.2, 0.2, 1))] = 0
    return lay_out(weights.to(draw.choice(DTYPES)), draw.layout())


def draw_shares(draw: Draw, problem: Problem) -> Tensor:
    """Probabilities (N, C): of one class, of two as after mixup, or of all; none where π_j is 0."""
    size = len(problem.features), len(problem.weight)
    kept = torch.zeros(size, dtype=torch.bool)
    count = min(size[1], draw.choice((1, 2, size[1])))
    for row in kept:
        row[draw.permutation(size[1])[:count]] = True
    shares = (draw.uniform(*size) + 0.01) * kept
    if problem.log_prior is not None:
        shares = shares * problem.log_prior.isfinite()
    shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return lay_out(shares.to(draw.choice(DTYPES)), draw.layout("expanded"))


def draw_leading(draw: Draw, rows: int) -> tuple[int, ...]:
    if rows == 1 and draw.chance(0.5):
        return ()
    divisors = [d for d in range(1, rows + 1) if rows % d == 0] or [3]
    first = draw.choice(divisors)
    return draw.choice(((rows,), (first, rows // first), (1, first, rows // first)))


def call(
    moved: Problem, door: Door, device: torch.device, backend: str | None
) -> tuple[Tensor, Tensor]:
    def shaped(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(device)
        return tensor.unflatten(0, door.leading) if door.leading else tensor[0]

    options = moved.options | {"reduction": door.reduction, "label_smoothing": door.smoothing}
    if door.shares is not None:
        del options["ignore_index"]
    both = iada.fused_loss(
        shaped(moved.features),
        moved.weight,
        moved.bias,
        shaped(moved.labels if door.shares is None else door.shares),
        covariance=moved.covariance,
        epsilon=shaped(moved.epsilon),
        log_prior=moved.log_prior,
        class_weight=None if door.class_weight is None else door.class_weight.to(device),
        row_weight=shaped(door.row_weight),
        return_logits=True,
        backend=backend,
        **options,
    )
    loss, logits = both
    return loss, logits


def finish(losses: Tensor, problem: Problem, door: Door, nudge: Draw | None, eps: float) -> Tensor:
    """Weights and reduction of the losses (N), at their dtype."""

    def of_rows(weights: Tensor) -> Tensor:
        return about(weights.to(losses.dtype), nudge, eps)

    weights = torch.ones_like(losses)
    if door.shares is None:
        labels = problem.labels.long()
        ignored = labels == problem.options["ignore_index"]
        if door.class_weight is not None:
            weights = weights * of_rows(door.class_weight)[labels.masked_fill(ignored, 0)]
        weights = weights.masked_fill(ignored, 0.0)
    if door.row_weight is not None:
        weights = weights * of_rows(door.row_weight)
    terms = torch.where(weights == 0, 0.0, losses) * weights
    if door.reduction == "none":
        return terms
    if door.reduction == "sum":
        return terms.sum()
    total = weights.sum()
    return terms.sum() / torch.where(total > 0, total, 1.0)


def dtype_of(problem: Problem, door: Door) -> torch.dtype:
    """Of the loss: probabilities count as the other arguments do, weights do not."""
    double = door.shares is not None and door.shares.dtype == torch.float64
    return torch.float64 if double else compute_dtype(problem)


def exactly(
    problem: Problem, door: Door, wanted: list[str], scale: float, nudge: Draw | None
) -> Found:
    def loss_of(p: Problem, nudge: Draw | None, eps: float) -> Tensor:
        if door.shares is None:
            losses, _ = exact_loss(p, nudge, eps)
        else:
            losses = exact_soft_losses(p, weighted_shares(door, p.features.dtype), nudge, eps)
        return finish(losses, problem, door, nudge, eps)

    dtype = dtype_of(problem, door)
    found = exact_gradients(problem, wanted, scale, nudge, dtype, loss_of)
    p, eps = problem.double(), torch.finfo(dtype).eps
    z = F.linear(p.features, p.weight, p.bias)
    if nudge is not None:
        z = z + eps * nudge.sign(z) * (p.features.abs() @ p.weight.abs().T)
    return found | {"logits": z}


def weighted_shares(door: Door, dtype: torch.dtype) -> Tensor:
    """What each −log p_j counts for, (N, C)."""
    assert door.shares is not None
    shares = door.shares.to(dtype)
    shares = (1 - door.smoothing) * shares + door.smoothing / shares.shape[1]
    return shares if door.class_weight is None else shares * door.class_weight.to(dtype)


def torch_ways(
    draw: Draw, problem: Problem, door: Door, wanted: list[str], scale: float
) -> list[Found]:
    """By torch's own operators, in several ways."""
    dtype = dtype_of(problem, door)
    orders = [draw.permutation(size) for size in (len(problem.features), *problem.weight.shape)]

    def soft(p: Problem) -> Tensor:
        p = p.map(lambda t: t.to(dtype))
        z = F.linear(p.features, p.weight, p.bias)
        if p.log_prior is not None:
            z = z + p.options["beta"] * p.log_prior
        shares = weighted_shares(door, dtype)
        return -torch.where(shares == 0, 0.0, shares * z.log_softmax(dim=1)).sum(dim=1)

    hard = (eager, as_defined, lambda p: in_another_order(p, orders))
    ways = []
    for losses_of in hard if door.shares is None else (soft,):
        way = gradients(
            lambda p, f=losses_of: finish(f(p), problem, door, None, 0.0), problem, wanted, scale
        )
        cast = problem.map(lambda t: t.to(dtype))
        ways.append(way | {"logits": F.linear(cast.features, cast.weight, cast.bias)})
    return ways
