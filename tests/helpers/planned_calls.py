"""Calls of the Triton backend that differ in one thing each, for planned_process.py.

Sizes, where tensors lie in memory, dtypes, what is absent or asked for, options, and what is in
force around the call: precision, configuration, device and Triton's own switches.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from bench.offline.combinations import FLOATS, TERMS, Combination, combinations
from iada_kernels.contract import ClassStatistics, HeadTangents, LossInputs, LossOptions
from iada_kernels.dispatch import triton_backend
from iada_kernels.triton import config

CONFIGURATIONS = (
    None,  # the interpreter's, because the tensors are on the CPU
    config.NVIDIA,
    replace(config.NVIDIA, single_launch=replace(config.NVIDIA.single_launch, rows=0)),
    replace(config.AMD, softmax_classes=8, split_rows=32),
)
MEMORY = ("plain", "shifted", "padded", "padded by 16", "transposed", "large")
LARGE = torch.empty(2**31, dtype=torch.uint8)  # which no one touches
CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("features", "head", "sigma", "labels", "vectors", "grad_loss"), MEMORY),
    "is_parameter": (False, True),
    "ignore_index": (-100, 0, 1, 16, 2**40),
    "alpha": (0.5, 0.0, 2, float("inf")),
    "configuration": (0, 1, 2, 3),
    "device": ("first", "second"),
    "debug": (False, True),
    "instrumentation": ("", "consan"),
}


@dataclass(frozen=True)
class Case:
    """A call, where its tensors lie and what else is in force."""

    call: Combination
    features: str = "plain"  # of MEMORY
    head: str = "plain"
    sigma: str = "plain"
    labels: str = "plain"
    vectors: str = "plain"
    grad_loss: str = "plain"
    is_parameter: bool = False
    needs_step: bool = True  # of Σ, along the hypergradient
    ignore_index: int = -100
    alpha: float = 0.5
    configuration: int = 0  # of CONFIGURATIONS
    device: str = "first"
    debug: bool = False
    instrumentation: str = ""


def families(count: int, seed: int = 0) -> Iterator[Case]:
    """Calls of moderate size, each before some that differ from it in one thing."""
    draw = random.Random(seed)
    for call in combinations(count, seed):
        sizes = (min(call.rows, 130), min(call.classes, 129), min(call.width, 80))
        call = replace(call, rows=sizes[0], classes=sizes[1], width=sizes[2])
        case = Case(call, configuration=draw.randrange(len(CONFIGURATIONS)))
        yield case
        if call.other == "hypergradient":
            yield replace(case, needs_step=False)
        for name in draw.sample(sorted(CHOICES), 5):
            yield replace(case, **{name: draw.choice(CHOICES[name])})
        for name, value in draw.sample(sorted(_others(call, draw).items()), 3):
            yield replace(case, call=replace(call, **{name: value}))


def _others(call: Combination, draw: random.Random) -> dict[str, Any]:
    """Another value of each field."""
    given = ["features", "weight", *(term for term in TERMS if term in call.terms)]
    name = draw.choice(given)
    needs = call.needs._replace(**{name: not getattr(call.needs, name)})
    return {
        "rows": draw.choice((1, 16, 31, 48)),
        "classes": draw.choice((1, 2, 16, 31)),
        "width": draw.choice((1, 2, 16, 31, 48)),
        "features": draw.choice(list(FLOATS)),
        "weight": draw.choice(list(FLOATS)),
        "covariance": draw.choice(("float32", "float64")),
        "streams": call.structure != "none" and not call.streams,
        "terms": tuple(t for t in TERMS if getattr(call.needs, t) or draw.random() < 0.5),
        "needs": needs,
        "reduction": draw.choice(("mean", "sum", "none")),
        "matmul": "high" if call.matmul == "highest" else "highest",
        "neighbours": draw.choice((0, 1, 5)),
    }


@contextlib.contextmanager
def in_force(case: Case) -> Iterator[None]:
    """What a case says of the world around its call; only the configuration is undone."""
    torch.set_float32_matmul_precision(case.call.matmul)
    driver.active.device = case.device
    knobs.runtime.debug, knobs.compilation.instrumentation_mode = case.debug, case.instrumentation
    configuration = CONFIGURATIONS[case.configuration]
    with contextlib.nullcontext() if configuration is None else config.use(configuration):
        yield


def calls_of(case: Case) -> list[Callable[[], object]]:
    """Its loss, and the other pass, on tensors that are made now."""
    inputs, call = _inputs(case), case.call
    options = LossOptions(case.alpha, 1.0, case.ignore_index, call.reduction)
    others = {
        "update": lambda: _update(inputs, case),
        "hypergradient": lambda: _hypergradient(inputs, options, case),
        "characteristics": lambda: _characteristics(inputs, case),
    }
    return [lambda: _loss(inputs, options, case), others[call.other]]


def _memory(kind: str, *size: int, dtype: torch.dtype) -> Tensor:
    """A tensor that lies as it says."""
    count = torch.Size(size).numel()
    if kind == "shifted":
        return torch.zeros(count + 1, dtype=dtype)[1:].view(size)
    if kind.startswith("padded"):
        more = 16 if kind == "padded by 16" else 3
        return torch.zeros(*size[:-1], size[-1] + more, dtype=dtype)[..., : size[-1]]
    if kind == "transposed":
        return torch.zeros(*size[::-1], dtype=dtype).permute(*range(len(size))[::-1])
    if kind == "large":
        return LARGE[: count * dtype.itemsize].view(dtype).view(size)
    return torch.zeros(size, dtype=dtype)


def _inputs(case: Case) -> LossInputs:
    call, sigma = case.call, None
    head = FLOATS[call.weight]
    if call.structure != "none":
        square = (call.width,) if call.structure == "diag" else (call.width, call.width)
        sigma = _memory(case.sigma, call.classes, *square, dtype=FLOATS[call.covariance])
    sizes = {"bias": call.classes, "epsilon": call.rows, "log_prior": call.classes}
    terms = {
        t: _memory(case.vectors, sizes[t], dtype=head) if t in call.terms else None for t in TERMS
    }
    weight = _memory(case.head, call.classes, call.width, dtype=head)
    return LossInputs(
        _memory(case.features, call.rows, call.width, dtype=FLOATS[call.features]),
        torch.nn.Parameter(weight) if case.is_parameter else weight,
        labels=_memory(case.labels, call.rows, dtype=torch.int64),
        covariance=sigma,
        **terms,
    )


def _statistics(inputs: LossInputs, case: Case) -> ClassStatistics:
    assert inputs.covariance is not None
    mean = _memory(case.sigma, *inputs.weight.shape, dtype=inputs.covariance.dtype)
    return ClassStatistics(mean, _memory(case.labels, len(mean), dtype=torch.int64))


def _loss(inputs: LossInputs, options: LossOptions, case: Case) -> None:
    passes, needs = triton_backend(), case.call.needs
    stream = _statistics(inputs, case) if case.call.streams else None
    loss, saved = passes.loss_forward(inputs, options, needs, stream)
    if case.grad_loss == "padded":  # as the backward of a sum gives it
        grad_loss = torch.ones((), dtype=loss.dtype).expand(loss.shape)
    elif loss.dim() == 1:
        grad_loss = _memory(case.grad_loss, len(loss), dtype=loss.dtype)
    else:
        grad_loss = _memory(case.grad_loss, 1, dtype=loss.dtype)[0]
    if any(needs):
        passes.loss_backward(inputs, options, saved, grad_loss, needs)


def _update(inputs: LossInputs, case: Case) -> None:
    if inputs.covariance is not None:
        state = _statistics(inputs, case)
        triton_backend().covariance_update(
            inputs.covariance, state.mean, state.count, inputs.features, inputs.labels
        )


def _hypergradient(inputs: LossInputs, options: LossOptions, case: Case) -> None:
    passes, sigma, dtype = triton_backend(), inputs.covariance, inputs.compute_dtype
    tangents = HeadTangents(
        torch.zeros(inputs.features.shape, dtype=dtype) if case.call.streams else None,
        _memory(case.grad_loss, *inputs.weight.shape, dtype=dtype),
        torch.zeros(len(inputs.weight), dtype=dtype) if inputs.bias is not None else None,
    )
    reduced = options._replace(reduction="sum" if options.reduction == "sum" else "mean")
    needs_covariance = sigma is not None and case.needs_step
    _, sums = passes.hypergradient(inputs, reduced, tangents, needs_covariance)
    if needs_covariance and sigma is not None:
        passes.covariance_step(sigma, inputs.weight, tangents.weight, sums, 0.1)


def _characteristics(inputs: LossInputs, case: Case) -> None:
    logits = _memory(case.head, *map(len, inputs[:2]), dtype=FLOATS[case.call.weight])
    triton_backend().characteristics(
        inputs.features, logits, inputs.labels, inputs.weight, case.call.neighbours
    )
