"""What a case draws: numbers, choices, and problems with everything that the contract permits."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iada_kernels.low_rank import LowRankCovariance
from tests.helpers.problems import LAYOUTS, REDUCTIONS, TENSORS, Problem, lay_out, sign_argument

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Limits:
    """The largest N, C and A, and the largest N·C·A: of the reference's temporaries."""

    rows: int
    classes: int
    width: int
    volume: int


COMPILED = Limits(150, 60, 90, 15_000)
INTERPRETED = Limits(40, 20, 36, 6_000)


class Draw:
    """The random numbers of one case; a case depends on nothing but its seed and its number."""

    def __init__(self, seed: int, case: int, limits: Limits) -> None:
        self.random = random.Random(f"{seed}/{case}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.limits = limits

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choice(self, options: Any) -> Any:
        return self.random.choice(options)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64)

    def unit(self, tensor: Tensor) -> Tensor:
        """Numbers in (−1, 1) of the shape of `tensor`."""
        return 2 * self.uniform(*tensor.shape) - 1

    def sign(self, tensor: Tensor) -> Tensor:
        """−1 or 1 for each number of `tensor`."""
        return 1 - 2 * torch.randint(2, tensor.shape, generator=self.generator).double()

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def size(self, largest: int) -> int:
        """1 to `largest`, small ones as often as large ones; a third of them around powers of 2."""
        size = round(largest ** self.random.random())
        if self.chance(0.3):
            size = 2 ** round(torch.tensor(size).log2().item()) + self.choice((-1, 0, 1))
        return min(largest, max(1, size))

    def shape(self) -> tuple[int, int, int]:
        """N (0 now and then), C and A."""
        limits = self.limits
        while True:
            rows, classes, width = map(self.size, (limits.rows, limits.classes, limits.width))
            if rows * classes * width <= limits.volume:
                return 0 if self.chance(0.02) else rows, classes, width

    def dtypes(self) -> dict[str, torch.dtype]:
        """One dtype for all tensors as often as any mixture of them."""
        if self.chance(0.5):
            return dict.fromkeys(TENSORS, self.choice(DTYPES))
        return {name: self.choice(DTYPES) for name in TENSORS}

    def layout(self, *without: str) -> str:
        """Contiguous half the time."""
        if self.chance(0.5):
            return "contiguous"
        return self.choice([layout for layout in LAYOUTS if layout not in without])


def draw_problem(draw: Draw, structure: str | None, reductions: tuple[str, ...] = REDUCTIONS):
    """A problem of any size, dtypes, layouts, scales and margins."""
    rows, classes, width = draw.shape()
    dtypes, unlabelled = draw.dtypes(), draw.choice((0.0, 0.0, 0.2, 0.7, 1.0))
    # Rows of the head are of norm 1, so that a margin is a number of logits.
    weight = draw.normal(classes, width) / width**0.5 + draw.choice((0, 0, 0, 1, 30))
    features = draw.normal(rows, width) * draw.choice((0.01, 1, 1, 1, 30)) + draw.choice((0, 0, 3))
    drawn = draw.permutation(classes)[: max(1, round(classes * draw.choice((1, 1, 0.5, 0.1))))]
    labels = drawn[(draw.uniform(rows) ** draw.choice((1, 3)) * len(drawn)).long()]
    if draw.chance(0.5):  # margins up to hundreds of either sign
        towards = weight[labels] / weight[labels].square().sum(dim=1, keepdim=True).clamp(min=0.01)
        features = features + draw.choice((-30, 5, 30, 300)) * draw.uniform(rows, 1) * towards
    ignore_index, label_dtype = draw_ignore_index(draw, classes)
    ignored = draw.uniform(rows) < unlabelled
    features[ignored] *= draw.choice((1, 1000))  # what counts for nothing may be anything
    prior = draw.uniform(classes) ** 4 + 1e-6
    options = {
        "alpha": draw.choice((0.5, 0.5, 0.0, 1.0, -0.3, 7.5)),
        "beta": draw.choice((1.0, 1.0, 0.0, 2.5, -1.0)),
        "ignore_index": ignore_index,
        "reduction": draw.choice(reductions),
    }
    tensors = {
        "features": features,
        "weight": weight,
        "bias": 3 * draw.normal(classes) if draw.chance(0.7) else None,
        "covariance": draw_covariance(draw, classes, width, structure),
        "epsilon": draw_epsilon(draw, rows) if draw.chance(0.7) else None,
        "log_prior": (prior / prior.sum()).log() if draw.chance(0.6) else None,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            dtype = dtypes[name]
            if name == "covariance" and dtype.itemsize < 4:
                dtype = torch.float32
            tensor = tensor.clamp(-60000, 60000) if dtype == torch.float16 else tensor
            # A head whose rows are all the same has differences made of rounding alone.
            without = ("expanded",) if name == "weight" else ()
            tensors[name] = lay_out(tensor.to(dtype), draw.layout(*without))
    problem = Problem(labels=labels, options=options, **tensors)
    problem = draw_empty_prior(draw, problem)
    return settle_labels(draw, problem, ignored, label_dtype)


def draw_ignore_index(draw: Draw, classes: int) -> tuple[int, torch.dtype]:
    """An index outside the classes or one of them, and a dtype of labels that can hold both."""
    if draw.chance(0.6):
        options = [-100, -100, -1, classes + 3, draw.random.randrange(classes)]
        return draw.choice(options), draw.choice(SIGNED)
    return draw.choice([255, classes, draw.random.randrange(classes), -100]), draw.choice(UNSIGNED)


def draw_covariance(draw: Draw, classes: int, width: int, structure: str | None) -> Tensor | None:
    """Symmetric, of 1e-6 to 1e6, of full rank or not; nothing for some classes."""
    scale = 10 ** draw.choice((-6, -2, 0, 0, 0, 2, 6))
    if structure is None:
        return None
    if structure == "diag":
        sigma = draw.normal(classes, width).square()
    elif structure == "low-rank":
        rank = draw.choice((1, 2, width, width + 1))
        factors = draw.normal(classes, width, rank) * draw.choice((0, 1, 1, 100)) / rank**0.5
        diagonal = draw.normal(classes, width).square() * draw.choice((0, 1, 1))
        factors *= (scale / width) ** 0.5
        sigma, scale = LowRankCovariance(diagonal * scale / width, factors).packed(), width
    else:
        rank = draw.choice((1, width + 2))
        factor = draw.normal(classes, width, rank) / rank**0.5
        sigma = factor @ factor.mT
        if draw.chance(0.05):  # only the symmetric part of one counts
            sigma = sigma + 0.3 * draw.normal(classes, width, width)
    empty = draw.uniform(classes) < draw.choice((0, 0, 0.3))
    sigma[empty] = 0
    return scale / width * sigma


def draw_epsilon(draw: Draw, rows: int) -> Tensor:
    """Strengths in (−1, 1), now and then all 0, at the ends, or far beyond."""
    return draw.unit(torch.empty(rows)) * draw.choice((1, 1, 1, 0, 20)) + draw.choice((0, 0, 1))


def draw_empty_prior(draw: Draw, problem: Problem) -> Problem:
    """Now and then a class without samples, whose log prior is −∞: nobody may have its label."""
    classes = len(problem.weight)
    if problem.log_prior is None or problem.options["beta"] <= 0 or not draw.chance(0.1):
        return problem
    absent = [c for c in range(classes) if not (problem.labels == c).any()]
    # An ignored row is computed as one of class 0 by those who then leave it out.
    absent = [c for c in absent if c != 0]
    if not absent:
        return problem
    prior = problem.log_prior.contiguous()
    prior[draw.choice(absent)] = -torch.inf
    return replace(problem, log_prior=prior)


def settle_labels(
    draw: Draw, problem: Problem, ignored: Tensor, label_dtype: torch.dtype
) -> Problem:
    """The problem with its labels as they are passed.

    A row with a coordinate whose sign rounding could decide is ignored: there two ways of computing
    may differ by more than rounding.
    """
    ignore_index, labels = problem.options["ignore_index"], problem.labels
    open_rows = undecided(problem)
    if ignore_index < 0 and label_dtype in UNSIGNED:
        ignored = torch.zeros_like(ignored)
        if (open_rows & (labels != ignore_index)).any():
            problem = replace(problem, epsilon=None)
    else:
        ignored = ignored | open_rows
    labels = torch.where(ignored, ignore_index, labels).to(label_dtype)
    return replace(
        problem,
        labels=lay_out(labels, "contiguous")
        if draw.chance(0.7)
        else torch.stack((labels, labels), dim=1)[:, 0],
    )


def compute_dtype(problem: Problem) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    double = any(tensor.dtype == torch.float64 for tensor in problem.floating().values())
    return torch.float64 if double else torch.float32


def undecided(problem: Problem) -> Tensor:
    """Rows (N) in which |g| of a coordinate is within a generous bound of the rounding of g."""
    if problem.epsilon is None or len(problem.weight) == 1:
        return torch.zeros(len(problem.features), dtype=torch.bool)
    p = problem.double()
    labels = problem.labels
    eps = torch.finfo(compute_dtype(problem)).eps
    size = p.features.abs() @ p.weight.abs().T
    logits = p.features @ p.weight.T
    if p.bias is not None:
        size, logits = size + p.bias.abs(), logits + p.bias
    others = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
    terms = others @ p.weight.abs() + p.weight[labels].abs()
    classes, width = p.weight.shape
    rounding = eps * (2 * (4 + width**0.5) * size.amax(dim=1, keepdim=True) + 8 + classes) * terms
    return (sign_argument(problem).abs() <= rounding).any(dim=1)
