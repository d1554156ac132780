"""What a training step launches at a reference shape, from the launchers themselves.

The tensors are meta tensors: they have shapes and no memory, and nothing runs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.shapes import Shape
from iada_kernels.contract import (
    ClassStatistics,
    HeadTangents,
    LossInputs,
    LossNeeds,
    LossOptions,
)
from iada_kernels.dispatch import triton_backend
from iada_kernels.triton.launch import Launch, recording

ALL_BUT_SIGMA = LossNeeds(True, True, True, False, True, False)
SIGMA_ALONE = LossNeeds(False, False, False, True, False, False)
FEATURES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEIGHBOURS = 10


def recorded(shape: Shape, architecture: str) -> Iterator[tuple[str, list[Launch]]]:
    """The parts of an iteration of Algorithm 1 by name, and the launches of each."""
    for dtype in FEATURES:
        with recording(execute=False, architecture=architecture) as launches:
            _step(shape, FEATURES[dtype], ALL_BUT_SIGMA, update=True)
        yield "step" if dtype == "float32" else f"step, {dtype}", launches
    parts = {
        "update": _update,
        "gradient by Σ": lambda shape: _step(shape, torch.float32, SIGMA_ALONE, update=False),
        "hypergradient": _hypergradient,
        "characteristics": _characteristics,
    }
    for name, part in parts.items():
        with recording(execute=False, architecture=architecture) as launches:
            part(shape)
        yield name, launches


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> LossInputs:
    n, c, a = shape.samples, shape.classes, shape.features
    sigma = _meta(c, a, a) if shape.structure == "full" else _meta(c, a)
    labels = _meta(n, dtype=torch.int64)
    return LossInputs(
        _meta(n, a, dtype=dtype), _meta(c, a), _meta(c), labels, sigma, _meta(n), _meta(c)
    )


def _statistics(shape: Shape) -> ClassStatistics:
    return ClassStatistics(
        _meta(shape.classes, shape.features), _meta(shape.classes, dtype=torch.int64)
    )


def _options(shape: Shape) -> LossOptions:
    return LossOptions(0.5, 1.0, shape.ignore_index, "mean")


def _step(shape: Shape, dtype: torch.dtype, needs: LossNeeds, update: bool) -> None:
    inputs, options = _inputs(shape, dtype), _options(shape)
    passes = triton_backend()
    _, saved = passes.loss_forward(inputs, options, needs, _statistics(shape) if update else None)
    passes.loss_backward(inputs, options, saved, _meta(), needs)


def _update(shape: Shape) -> None:
    inputs, state = _inputs(shape), _statistics(shape)
    assert inputs.covariance is not None
    triton_backend().covariance_update(
        inputs.covariance, state.mean, state.count, inputs.features, inputs.labels
    )


def _hypergradient(shape: Shape) -> None:
    inputs = _inputs(shape)
    tangents = HeadTangents(_meta(*inputs.features.shape), _meta(*inputs.weight.shape), None)
    passes = triton_backend()
    _, sums = passes.hypergradient(inputs, _options(shape), tangents, True)
    assert inputs.covariance is not None
    passes.covariance_step(inputs.covariance, inputs.weight, tangents.weight, sums, 0.1)


def _characteristics(shape: Shape) -> None:
    inputs = _inputs(shape)
    logits = _meta(shape.samples, shape.classes)
    triton_backend().characteristics(
        inputs.features, logits, inputs.labels, inputs.weight, NEIGHBOURS
    )
