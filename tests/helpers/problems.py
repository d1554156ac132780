"""Random problems for the loss, and the ways to compute one: reference, eager, fused.

The sign of the perturbation flips where its argument g is within rounding of 0, which is a
legitimate difference between two ways of computing; problems are redrawn until no |g| is small.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor, nn

import iada
from iada_kernels import reference
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.low_rank import LowRankCovariance

TENSORS = ("features", "weight", "bias", "covariance", "epsilon", "log_prior")
LAYOUTS = ("contiguous", "transposed", "step", "offset", "expanded")
REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class Problem:
    """The arguments of one call."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    covariance: Tensor | None
    epsilon: Tensor | None
    log_prior: Tensor | None
    options: dict = field(default_factory=dict)

    def floating(self) -> dict[str, Tensor]:
        """The floating tensors that are present, by name."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with each floating tensor changed."""
        return replace(self, **{name: change(t) for name, t in self.floating().items()})

    def with_options(self, **options) -> "Problem":
        return replace(self, options=self.options | options)

    def double(self) -> "Problem":
        return self.map(Tensor.double)

    def to(self, device: torch.device) -> "Problem":
        moved = self.map(lambda t: t.to(device))
        return replace(moved, labels=self.labels.to(device))

    def records(self) -> tuple[LossInputs, LossOptions]:
        """As a backend and the reference take it."""
        values = {name: getattr(self, name) for name in LossInputs._fields}
        values["labels"] = self.labels.long()
        return LossInputs(**values), LossOptions(**self.options)

    def tensors(self) -> list[Tensor]:
        found = [getattr(self, f.name) for f in fields(self)]
        return [t for t in found if isinstance(t, Tensor)]


LossFunction = Callable[[Problem], Tensor]


def reference_loss(problem: Problem) -> Tensor:
    return reference.iada_loss(*problem.records())


def reference_loss_of_head(head: nn.Linear, features: Tensor, labels: Tensor, **terms) -> Tensor:
    """The mean loss by the definition, for a linear head; `terms` of `LossInputs` and options."""
    options = {name: terms.pop(name) for name in ("alpha", "beta") if name in terms}
    absent = dict.fromkeys(("covariance", "epsilon", "log_prior"))
    inputs = LossInputs(features, head.weight, head.bias, labels, **absent | terms)
    return reference.iada_loss(inputs, LossOptions(**options))


def _call(function: Callable[..., Tensor], problem: Problem, **more) -> Tensor:
    tensors = {name: getattr(problem, name) for name in LossInputs._fields}
    return function(**tensors, **problem.options, **more)


def eager(problem: Problem) -> Tensor:
    return _call(iada.eager_loss, problem)


def fused(backend: str | None) -> LossFunction:
    """`fused_loss` on one backend."""
    return partial(_call, iada.fused_loss, backend=backend)


def value_and_gradients(
    loss_of: LossFunction, problem: Problem, create_graph: bool = False
) -> dict[str, Tensor]:
    """The loss, under "loss", and the gradient of every floating tensor, under its name."""
    leaves = problem.map(lambda t: t.detach().requires_grad_())
    loss = loss_of(leaves)
    wanted = leaves.floating()
    grads = torch.autograd.grad(loss, list(wanted.values()), cotangent(loss), create_graph)
    return {"loss": loss.detach(), **dict(zip(wanted, map(Tensor.detach, grads), strict=True))}


def cotangent(loss: Tensor) -> Tensor:
    """A fixed gradient of the loss, different for each row and never 1."""
    rows = torch.arange(loss.numel(), dtype=loss.dtype, device=loss.device)
    return (1.3 + torch.cos(1.7 * rows)).reshape(loss.shape)


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Equal in the max norm of each tensor, relative to the largest number of that tensor."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        have = actual[name]
        assert have.shape == want.shape, name
        if want.numel():
            error, scale = max_norm(have.double() - want.double()), max_norm(want)
            # Nothing is known of a tensor below the rounding of sums of numbers of order 1.
            assert error <= tolerance * max(scale, 1e-2), f"{name}: {error:.2e} of {scale:.2e}"


def max_norm(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def random_problem(
    rows: int = 7,
    classes: int = 4,
    width: int = 5,
    *,
    structure: str | None = "full",
    rank: int = 3,
    bias: bool = True,
    epsilon: bool = True,
    log_prior: bool = True,
    ignored: float = 0.25,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float64,
    dtypes: dict[str, torch.dtype] | None = None,
    layouts: dict[str, str] | None = None,
    label_dtype: torch.dtype = torch.int64,
    margin: float = 1e-5,
    seed: int = 0,
    **options,
) -> Problem:
    """A problem whose every |g| exceeds `margin` times the largest weight.

    `ignored` is the share of rows that carry ignore_index. `dtypes` and `layouts` go by the name
    of the tensor; a covariance stays at float32 or better. rank: of structure "low-rank", packed.
    """
    dtypes, layouts = dtypes or {}, layouts or {}
    options = {"alpha": 0.5, "beta": 1.0, "ignore_index": -100, "reduction": "mean"} | options

    def finish(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        kind = dtypes.get(name, dtype)
        if name == "covariance" and kind.itemsize < 4:
            kind = torch.float32
        return lay_out(tensor.to(kind), layouts.get(name, "contiguous"))

    for attempt in range(200):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (rows,), generator=generator)
        labels[uniform(rows) < ignored] = options["ignore_index"]
        prior = uniform(classes) + 0.1
        problem = Problem(
            finish("features", normal(rows, width)),
            finish("weight", normal(classes, width)),
            finish("bias", normal(classes)) if bias else None,
            labels.to(label_dtype),
            finish("covariance", _covariance(normal, classes, width, structure, rank, symmetric)),
            finish("epsilon", 2 * uniform(rows) - 1) if epsilon else None,
            finish("log_prior", (prior / prior.sum()).log()) if log_prior else None,
            options,
        )
        if sign_margin(problem) > margin:
            return problem
    raise AssertionError(f"every draw has a coordinate of g within {margin} of 0")


def confident_problem(scale: float, structure: str | None, epsilon: bool = False) -> Problem:
    """Twelve classes on a circle and a row of each: 1 − p_y is 2 exp(−0.134 scale) in all of them.

    In float64 the definition knows it to 1e-16 / (1 − p_y) of itself. In any precision logits, and
    so exponents, are known to eps · scale.
    """
    labels = torch.arange(12)
    angle = 0.2 + labels.double() * (torch.pi / 6)  # no coordinate is 0: signs are beyond doubt
    weight = torch.stack([angle.cos(), angle.sin()], dim=1)
    sigma = {None: None, "diag": torch.ones(12, 2).double()}
    sigma["full"] = torch.eye(2).double().repeat(12, 1, 1)
    strength = torch.linspace(-0.1, 0.1, 12).double() if epsilon else None
    options = {"alpha": 0.5, "beta": 1.0, "ignore_index": -100, "reduction": "sum"}
    return Problem(scale * weight, weight, None, labels, sigma[structure], strength, None, options)


def _covariance(
    normal: Callable[..., Tensor],
    classes: int,
    width: int,
    structure: str | None,
    rank: int,
    symmetric: bool,
) -> Tensor | None:
    if structure is None:
        return None
    if structure == "diag":
        return normal(classes, width).square()
    if structure == "low-rank":
        factors = normal(classes, width, rank) / max(1, rank) ** 0.5
        return LowRankCovariance(normal(classes, width).square(), factors).packed()
    factor = normal(classes, width, width + 2) / (width + 2) ** 0.5
    sigma = factor @ factor.mT
    return sigma if symmetric else sigma + 0.5 * normal(classes, width, width)


def sign_argument(problem: Problem) -> Tensor:
    """g = Σ_{j≠y} r_j w_j − w_y (N, A), in float64."""
    p = problem.double()
    target = target_of(p)
    logits = torch.nn.functional.linear(p.features, p.weight, p.bias)
    others = logits.scatter(1, target[:, None], -torch.inf).softmax(dim=1)
    return others @ p.weight - p.weight[target]


def adjusted_logits(problem: Problem) -> Tensor:
    """z̃ (N, C), in float64."""
    p = problem.double()
    inputs, options = replace(p, labels=target_of(p)).records()
    return reference.adjusted_logits(inputs, options)


def target_of(problem: Problem) -> Tensor:
    """The labels as int64, 0 where they are ignored."""
    labels = problem.labels.long()
    return torch.where(labels == problem.options["ignore_index"], 0, labels)


def sign_margin(problem: Problem) -> float:
    """The smallest |g| as a share of the largest weight; inf where the sign is of no account."""
    if problem.epsilon is None or len(problem.weight) == 1 or not len(problem.features):
        return torch.inf
    return (sign_argument(problem).abs().min() / problem.weight.double().abs().max()).item()


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` with other strides; "expanded" repeats its first entry, so it changes the values."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.contiguous()
    if layout == "step":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        strided = wide[..., ::2]
    elif layout == "offset":
        wide = torch.full([size + 2 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        strided = wide[tuple(slice(1, -1) for _ in tensor.shape)]
    else:
        raise ValueError(layout)
    return strided.copy_(tensor)
