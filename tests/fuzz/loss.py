"""The loss and its gradients, alone and with a stream that takes the batch in first."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import iada
from iada_kernels import reference
from iada_kernels.low_rank import LowRankCovariance, is_low_rank, unpacked
from tests.fuzz.draw import Draw, compute_dtype, draw_problem
from tests.fuzz.exact import NUDGES, about, about_columns, exact_gradients
from tests.fuzz.judge import Judged, broken, holds, judged
from tests.helpers.problems import Problem, cotangent, eager, fused

Found = dict[str, Tensor]
Loss = Callable[[Problem], Tensor]


def fuzz_loss(
    draw: Draw,
    backend: str,
    device: torch.device,
    structures: tuple[str | None, ...] = (None, "full", "full", "diag"),
) -> list[Judged]:
    problem = draw_problem(draw, draw.choice(structures))
    smoothing = draw.choice((0.0, 0.0, 0.0, 0.1))
    if backend == "torch" and not has_an_infinity(problem.log_prior):  # others do without it
        problem = problem.with_options(label_smoothing=smoothing)
    wanted = [name for name in problem.floating() if draw.chance(0.6)]
    scale = draw.choice((1.0, 1.0, 65536.0, 1e-3))  # that of the gradient that comes in
    graph = draw.chance(0.1)

    moved = problem.to(device)
    is_unchanged = unchanged_after(moved.tensors())
    found = {k: t.cpu() for k, t in gradients(fused(backend), moved, wanted, scale, graph).items()}
    unchanged = is_unchanged()
    exact = exact_gradients(problem, wanted, scale)
    nudged = [exact_gradients(problem, wanted, scale, draw) for _ in range(NUDGES)]
    ways = torch_gradients(draw, problem, wanted, scale)
    return [
        holds("no argument is changed", unchanged),
        *compared(found, ways, exact, nudged),
        *ignored_are_zero(problem, found),
    ]


def fuzz_stream(draw: Draw, backend: str, device: torch.device) -> list[Judged]:
    """`IADALoss` in training mode: Σ, μ, n and then the loss with the new Σ."""
    structure = draw.choice(("full", "diag"))
    problem = draw_problem(draw, structure)
    assert problem.covariance is not None
    classes, width = problem.weight.shape
    dtype = problem.covariance.dtype
    count = torch.randint(0, 50, (classes,), generator=draw.generator)
    count *= draw.uniform(classes) < 0.7
    sigma = problem.covariance.contiguous()
    if structure == "full":
        sigma = (sigma + sigma.mT) / 2  # the state's is symmetric
    state = (sigma, draw.normal(classes, width).to(dtype), count)
    wanted = [n for n in problem.floating() if n not in ("covariance", "log_prior")]
    wanted = [name for name in wanted if draw.chance(0.6)]
    options = problem.options

    module = iada.IADALoss(classes, width, None, structure, backend=backend, **options)
    module = module.to(device=device, dtype=dtype)
    buffers = module.covariance
    for buffer, value in zip((buffers.covariance, buffers.mean, buffers.count), state, strict=True):
        buffer.copy_(value)
    if problem.log_prior is not None:
        module.log_prior = problem.log_prior.to(device)

    def ours(moved: Problem) -> Tensor:
        return module(moved.features, moved.weight, moved.bias, moved.labels, moved.epsilon)

    problem = replace(problem, covariance=None)
    found = gradients(ours, problem.to(device), wanted, 1.0)
    found |= {"covariance after": buffers.covariance, "mean after": buffers.mean}
    found = {name: tensor.cpu() for name, tensor in found.items()}
    assert not module.covariance.covariance.requires_grad

    dtype = compute_dtype(replace(problem, covariance=state[0]))
    exact, *nudged = (
        exactly_updated(problem, state, wanted, nudge, dtype) for nudge in (None, *[draw] * NUDGES)
    )
    ways = []
    order = draw.permutation(len(problem.labels))
    for rows in (torch.arange(len(order)), order):
        taken = updated(problem, state, rows)
        streamed = replace(problem, covariance=taken["covariance after"])
        ways += [way | taken for way in torch_gradients(draw, streamed, wanted, 1.0)]
    counts = torch.bincount(*counted_labels(problem)[1:], minlength=classes)
    return [
        holds("count", torch.equal(buffers.count.cpu(), count + counts)),
        *compared(found, ways, exact, nudged),
        *ignored_are_zero(problem, found),
        *untouched(state, found, counts),
    ]


def exactly_updated(
    problem: Problem,
    state: tuple[Tensor, ...],
    wanted: list[str],
    nudge: Draw | None,
    dtype: torch.dtype,
) -> Found:
    """In float64; with `nudge`, as if features and state had been rounded to theirs."""
    sigma, mean, count = state
    eps = torch.finfo(mean.dtype).eps
    features = about_columns(problem.features.double(), nudge, eps)
    given = about(sigma.double(), nudge, eps), about(mean.double(), nudge, eps), count
    taken = updated(replace(problem, features=features), given)
    taken = {name: about(tensor, nudge, eps) for name, tensor in taken.items()}
    streamed = replace(problem, covariance=taken["covariance after"])
    return exact_gradients(streamed, wanted, 1.0, nudge, dtype) | taken


def updated(problem: Problem, state: tuple[Tensor, ...], order: Tensor | None = None) -> Found:
    """Σ and μ by the definition at the dtype of `state`, the rows taken in the order given."""
    rows, labels = counted_labels(problem)
    if order is not None:
        inverse = order[torch.isin(order, rows)]
        rows, labels = inverse, problem.labels.long()[inverse]
    features = problem.features[rows].to(state[1].dtype)
    sigma, mean, _ = reference.covariance_update(*state, features, labels)
    return {"covariance after": sigma, "mean after": mean}


def counted_labels(problem: Problem) -> tuple[Tensor, Tensor]:
    """The rows that are not ignored, and their labels."""
    labels = problem.labels.long()
    rows = (labels != problem.options["ignore_index"]).nonzero()[:, 0]
    return rows, labels[rows]


def untouched(state: tuple[Tensor, ...], found: Found, counts: Tensor) -> list[Judged]:
    """Classes without rows in the batch keep their bits."""
    absent = counts == 0
    pairs = ((found["covariance after"], state[0]), (found["mean after"], state[1]))
    same = all(torch.equal(after[absent], before[absent]) for after, before in pairs)
    return [holds("absent classes keep their bits", same)]


def compared(found: Found, ways: list[Found], exact: Found, nudged: list[Found]) -> list[Judged]:
    if found.keys() != exact.keys():
        return [broken(f"gradients of {list(found)} for {list(exact)}")]
    return [
        judged(name, found[name], [w[name] for w in ways], exact[name], [n[name] for n in nudged])
        for name in exact
    ]


def ignored_are_zero(problem: Problem, found: Found) -> list[Judged]:
    """What an ignored row gets is 0 and not merely small."""
    ignored = problem.labels.long() == problem.options["ignore_index"]
    names = [name for name in ("features", "epsilon") if name in found]
    if problem.options["reduction"] == "none":
        names.append("loss")
    zero = all((found[name][ignored] == 0).all() for name in names)
    return [holds("ignored rows are 0", zero)] if names else []


def has_an_infinity(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.isinf().any())


def unchanged_after(tensors: list[Tensor]) -> Callable[[], bool]:
    """Whether nobody has written to them since."""
    kept = [(t, t.clone(), t._version) for t in tensors]
    return lambda: all(t._version == v and same_bits(t, copy) for t, copy, v in kept)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


# The ways to compute it ----------------------------------------------------------------------


def gradients(
    loss_of: Loss, problem: Problem, wanted: list[str], scale: float, graph: bool = False
) -> Found:
    """The loss and the gradients of the tensors `wanted`, of which alone they are asked for."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in wanted}
    loss = loss_of(replace(problem, **leaves))
    found = {"loss": loss.detach()}
    if leaves:
        upstream = scale * cotangent(loss.detach())
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream, create_graph=graph)
        found |= {name: grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    return found


def torch_gradients(draw: Draw, problem: Problem, wanted: list[str], scale: float) -> list[Found]:
    orders = [draw.permutation(size) for size in (len(problem.labels), *problem.weight.shape)]
    ways = (eager, as_defined, lambda p: in_another_order(p, orders))
    return [gradients(way, problem, wanted, scale) for way in ways]


def as_defined(problem: Problem) -> Tensor:
    """The definition at the compute dtype."""
    cast = problem.map(lambda t: t.to(compute_dtype(problem)))
    return reference.iada_loss(*cast.records())


def in_another_order(problem: Problem, orders: list[Tensor]) -> Tensor:
    """The definition with rows, classes and features in the orders given."""
    p = permuted(problem.map(lambda t: t.to(compute_dtype(problem))), orders)
    losses = as_defined(p)
    if p.options["reduction"] == "none":
        losses = losses[orders[0].argsort()]
    return losses


def permuted(p: Problem, orders: list[Tensor]) -> Problem:
    """The same problem in another order; ignored labels become −100."""
    rows, classes, width = orders
    labels = p.labels.long()[rows]
    ignored = labels == p.options["ignore_index"]
    labels = torch.where(ignored, -100, classes.argsort()[labels.masked_fill(ignored, 0)])
    sigma = p.covariance
    if sigma is not None and is_low_rank(sigma, len(width)):
        parts = unpacked(sigma, len(width))
        sigma = LowRankCovariance(*(part[classes][:, width] for part in parts)).packed()
    elif sigma is not None:
        sigma = sigma[classes][:, width]
        sigma = sigma[:, :, width] if sigma.dim() == 3 else sigma
    return Problem(
        p.features[rows][:, width],
        p.weight[classes][:, width],
        None if p.bias is None else p.bias[classes],
        labels,
        sigma,
        None if p.epsilon is None else p.epsilon[rows],
        None if p.log_prior is None else p.log_prior[classes],
        {**p.options, "ignore_index": -100},
    )
