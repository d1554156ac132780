"""The streaming covariance however it is cut, the hypergradient, and the characteristics."""

from dataclasses import replace

import torch
from torch import Tensor

import iada
from iada_kernels import reference, select_backend
from iada_kernels.contract import HeadTangents
from tests.fuzz.draw import DTYPES, SIGNED, Draw, compute_dtype, draw_problem
from tests.fuzz.exact import (
    NUDGES,
    about,
    about_columns,
    exact_characteristics,
    exact_hypergradient,
    rounded_characteristics,
)
from tests.fuzz.judge import Judged, holds, judged
from tests.fuzz.loss import Found, compared, permuted, same_bits
from tests.helpers.problems import Problem, lay_out

BUFFERS = ("covariance", "mean", "count")


def fuzz_covariance(draw: Draw, backend: str, device: torch.device) -> list[Judged]:
    """A stream cut anywhere, against the statistics of all of it in one look."""
    rows, classes, width = draw.shape()
    structure, dtype = draw.choice(("full", "diag")), draw.choice((torch.float32, torch.float64))
    mix = draw.normal(width, width) / width**0.5 * draw.choice((1e-3, 1, 1, 1e3))
    labels = (draw.uniform(rows) ** draw.choice((1, 4)) * classes).long()
    offset = draw.choice((0, 1, 100)) * draw.normal(classes, width)
    features = (draw.normal(rows, width) + offset[labels]) @ mix
    features = lay_out(features.to(draw.choice(DTYPES[:3])), draw.layout())
    ignore_index = draw.choice([-100, classes, draw.random.randrange(classes)])
    labels[draw.uniform(rows) < draw.choice((0, 0.3, 1))] = ignore_index
    labels = labels.to(draw.choice(SIGNED))
    cuts = [draw.random.randrange(rows + 1) for _ in range(draw.choice((0, 1, 1, 4)))]
    borders = [0, *sorted(cuts), rows]
    parts = [slice(a, b) for a, b in zip(borders, borders[1:], strict=False)]

    state = iada.ClassCovariance(classes, width, structure).to(device=device, dtype=dtype)
    for part in parts:
        batch = features[part].to(device), labels[part].to(device)
        state.update(*batch, ignore_index=ignore_index, backend=backend)
    ours = {name: getattr(state, name).cpu() for name in BUFFERS}

    counted = labels.long() != ignore_index
    diagonal = structure == "diag"
    found = reference.population_statistics(
        features[counted].double(), labels[counted].long(), classes, diagonal
    )
    exact = dict(zip(BUFFERS, found, strict=True))
    orders = [torch.arange(rows), *(_within(draw, parts, rows) for _ in range(2))]
    kept = [(features[o], labels[o].long(), counted[o]) for o in orders]
    ways = [_stream(*arrays, parts, classes, diagonal, dtype) for arrays in kept]
    whole = (parts, classes, diagonal, torch.float64, draw, torch.finfo(dtype).eps)
    rounded = [_stream(*arrays, *whole) for arrays in kept[:1] * NUDGES]
    results = [holds("count", torch.equal(ours.pop("count"), exact.pop("count")))]
    return results + compared(ours, ways, exact, rounded)


def _within(draw: Draw, parts: list[slice], rows: int) -> Tensor:
    """An order of the rows that moves none into another part."""
    pieces = [torch.arange(rows)[part] for part in parts]
    return torch.cat([piece[draw.permutation(len(piece))] for piece in pieces])


def _stream(
    features: Tensor,
    labels: Tensor,
    counted: Tensor,
    parts: list[slice],
    classes: int,
    diagonal: bool,
    dtype: torch.dtype,
    nudge: Draw | None = None,
    eps: float = 0.0,
) -> Found:
    """By the definition at `dtype`; with `nudge`, as if features and state were rounded."""
    width = features.shape[1]
    shape = (classes, width) if diagonal else (classes, width, width)
    sigma, mean = torch.zeros(shape, dtype=dtype), torch.zeros(classes, width, dtype=dtype)
    count = torch.zeros(classes, dtype=torch.int64)
    for part in parts:
        rows = counted[part]
        batch = about_columns(features[part][rows].to(dtype), nudge, eps), labels[part][rows]
        sigma, mean, count = reference.covariance_update(sigma, mean, count, *batch)
        sigma, mean = about(sigma, nudge, eps), about(mean, nudge, eps)
    return {"covariance": sigma, "mean": mean}


def fuzz_hypergradient(draw: Draw, backend: str, device: torch.device) -> list[Judged]:
    """Both passes of it: ∂L̇/∂ε, and a step of Σ along ∂L̇/∂Σ."""
    problem = draw_problem(draw, draw.choice((None, "full", "diag")), ("mean", "sum"))
    problem = replace(problem, labels=problem.labels.long())
    dtype = compute_dtype(problem)
    sigma = problem.covariance
    if sigma is not None and sigma.dim() == 3:
        problem = replace(problem, covariance=(sigma + sigma.mT) / 2)
    size = draw.choice((1e-4, 1.0, 1.0, 100.0))

    def direction(tensor: Tensor | None, share: float) -> Tensor | None:
        if tensor is None or not draw.chance(share):
            return None
        drawn = size * draw.normal(*tensor.shape)
        return lay_out(drawn.to(dtype), draw.layout("expanded"))

    tangents = HeadTangents(
        direction(problem.features, 0.7),
        direction(problem.weight, 1.0),
        direction(problem.bias, 0.8),
    )
    step = draw.choice((1.0, -0.1))
    ours, unchanged = _by_backend(problem, tangents, step, backend, device)
    exact, *nudged = (
        exact_hypergradient(problem, tangents, nudge, dtype) for nudge in (None, *[draw] * NUDGES)
    )
    for found in (exact, *nudged):
        if sigma is not None:
            found["covariance"] = step * found["covariance"]
    cast = problem.map(lambda t: t.to(dtype))
    ways = [_derivatives(cast, tangents, step)]
    for _ in range(2):
        orders = [draw.permutation(n) for n in (len(problem.labels), *problem.weight.shape)]
        ways.append(_in_another_order(cast, tangents, step, orders))
    for way in ways:  # the step is taken in the dtype of Σ
        if sigma is not None:
            way["covariance"] = way["covariance"].to(sigma.dtype)
    results = [holds("no argument is changed", unchanged), *compared(ours, ways, exact, nudged)]
    ignored = problem.labels == problem.options["ignore_index"]
    if "epsilon" in ours:
        results.append(holds("ignored rows are 0", bool((ours["epsilon"][ignored] == 0).all())))
    if "covariance" in ours:
        found = ours["covariance"]
        classes = torch.arange(len(found))
        absent = ~torch.isin(classes, problem.labels[~ignored])
        results.append(holds("absent classes are 0", bool((found[absent] == 0).all())))
        if found.dim() == 3:
            results.append(holds("step is symmetric", torch.equal(found, found.mT)))
    return results


def _by_backend(
    problem: Problem, tangents: HeadTangents, step: float, backend: str, device: torch.device
) -> tuple[Found, bool]:
    p = problem.to(device)
    kept = [(t, t.clone()) for t in p.tensors()]
    moved = (None if t is None else t.to(device) for t in tangents)
    tangents = HeadTangents(*moved)
    inputs, options = p.records()
    passes = select_backend(backend, device, p.features.dtype)
    wanted = p.covariance is not None
    epsilon, sums = passes.hypergradient(inputs, options, tangents, wanted)
    found = {} if epsilon is None else {"epsilon": epsilon.cpu()}
    if p.covariance is not None:
        sigma = torch.zeros_like(p.covariance, memory_format=torch.contiguous_format)
        passes.covariance_step(sigma, p.weight, tangents.weight, sums, step)
        found["covariance"] = sigma.cpu()
    return found, all(same_bits(t, copy) for t, copy in kept)


def _derivatives(p: Problem, directions: tuple[Tensor | None, ...], step: float) -> Found:
    """By the definition at the dtype of the problem."""
    if p.epsilon is None and p.covariance is None:
        return {}
    epsilon, covariance = reference.hypergradient(*p.records(), HeadTangents(*directions))
    found = {"epsilon": epsilon, "covariance": None if covariance is None else step * covariance}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _in_another_order(
    problem: Problem, directions: tuple[Tensor | None, ...], step: float, orders: list[Tensor]
) -> Found:
    rows, classes, width = orders
    features, weight, bias = directions
    assert weight is not None
    found = _derivatives(
        permuted(problem, orders),
        (
            None if features is None else features[rows][:, width],
            weight[classes][:, width],
            None if bias is None else bias[classes],
        ),
        step,
    )
    if "epsilon" in found:
        found["epsilon"] = found["epsilon"][rows.argsort()]
    if "covariance" in found:
        sigma = found["covariance"][classes.argsort()][:, width.argsort()]
        found["covariance"] = sigma[:, :, width.argsort()] if sigma.dim() == 3 else sigma
    return found


def fuzz_characteristics(draw: Draw, backend: str, device: torch.device) -> list[Judged]:
    """Each of the eight columns by itself; the last one where no two neighbours tie."""
    rows, classes, width = draw.shape()
    given = draw.choice(DTYPES)
    dtype = torch.promote_types(torch.float32, given)
    scale = (
        draw.choice((1e-2, 1, 1, 100))
        if given == torch.float16
        else 10 ** draw.choice((-6, 0, 0, 0, 6))
    )
    features = draw.normal(rows, width) * scale
    features[draw.uniform(rows) < draw.choice((0, 0, 0.1))] = 0
    logits = draw.normal(rows, classes) * draw.choice((0.1, 3, 3, 100))
    labels = torch.randint(classes, (rows,), generator=draw.generator)
    weight = draw.normal(classes, width) * draw.choice((0.01, 1, 1, 10))
    neighbours = draw.choice((1, 2, 5, 10))
    floats = [lay_out(t.to(given), draw.layout()) for t in (features, logits, weight)]
    kept = [t.clone() for t in floats]
    features, logits, weight = floats
    passes = select_backend(backend, device, given)
    arguments = (features, logits, labels, weight)
    ours = passes.characteristics(*(t.to(device) for t in arguments), neighbours).cpu()

    exact = exact_characteristics(
        *(features.double(), logits.double(), labels, weight.double()), neighbours
    )
    h, z, w = (t.to(dtype) for t in floats)
    ways = [reference.batch_characteristics(h, z, labels, w, neighbours)]
    order, columns = draw.permutation(rows), draw.permutation(width)
    other = reference.batch_characteristics(
        h[order][:, columns], z[order], labels[order], w[:, columns], neighbours
    )
    ways.append(other[order.argsort()])
    eps = torch.finfo(dtype).eps
    nudged = [rounded_characteristics((*arguments, neighbours), draw, eps) for _ in range(NUDGES)]
    # Of a few random signs a row's own logit and its largest may all have the same.
    apart = 2 * torch.nn.functional.one_hot(labels, classes).double() - 1
    for unit in (eps, -eps):
        moved = logits.double() * (1 + unit * apart)
        nudged.append(
            exact_characteristics(features.double(), moved, labels, weight.double(), neighbours)
        )
    results = [holds("no argument is changed", all(map(same_bits, floats, kept)))]
    if ours.shape != exact.shape or ours.dtype != dtype:
        return [holds(f"{ours.dtype} {tuple(ours.shape)}", False)]
    decided = ~_ties(features, neighbours, eps)
    for column in range(8):
        use = decided if column == 7 else torch.ones_like(decided)
        found = [t[use, column] for t in (ours, exact)]
        others = ([t[use, column] for t in group] for group in (ways, nudged))
        torch_ways, nudges = others
        results.append(judged(f"column {column}", found[0], torch_ways, found[1], nudges))
    return results


def _ties(features: Tensor, neighbours: int, eps: float) -> Tensor:
    """Rows whose k-th and (k+1)-th neighbour are equally near but for rounding."""
    rows, width = features.shape
    k = min(neighbours, rows - 1)
    if k < 1 or k >= rows - 1:
        return torch.zeros(rows, dtype=torch.bool)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf).sort(dim=1, descending=True).values
    return similarity[:, k - 1] - similarity[:, k] <= 8 * eps * (2 + width**0.5)
