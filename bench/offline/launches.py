"""What a training step launches at a reference shape, from the launchers themselves.

The tensors are meta tensors: they have shapes and no memory, and nothing runs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measuring.shapes import Shape
from iada_kernels.contract import ClassStatistics, HeadTangents, LossInputs, LossNeeds, LossOptions
from iada_kernels.dispatch import triton_backend
from iada_kernels.triton.launch import Launch, recording

ALL_BUT_SIGMA = LossNeeds(True, True, True, False, True, False)
SIGMA_ALONE = LossNeeds(False, False, False, True, False, False)
FEATURES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEIGHBOURS = 10


def relaunch(launch: Launch) -> Any:
    """A recorded launch alone: its counters are at 0 first, where the launch before leaves them."""
    for name, counters in launch.leaves().items():
        if name.rpartition(".")[2] == "arrived" and counters is not None:
            counters.zero_()
    return launch()


def recorded(shape: Shape, architecture: str) -> Iterator[tuple[str, list[Launch]]]:
    """The parts of an iteration of Algorithm 1 by name, and the launches of each."""
    inputs, options = inputs_of(shape), options_of(shape)
    halves = inputs._replace(features=meta(*inputs.features.shape, dtype=FEATURES["bfloat16"]))
    tangents = HeadTangents(meta(*inputs.features.shape), meta(*inputs.weight.shape), None)
    parts: dict[str, Callable[[], None]] = {
        "step": lambda: loss_pass(inputs, options, ALL_BUT_SIGMA, streams=True),
        "step, bfloat16": lambda: loss_pass(halves, options, ALL_BUT_SIGMA, streams=True),
        "update": lambda: update_pass(inputs),
        "gradient by Σ": lambda: loss_pass(inputs, options, SIGMA_ALONE, streams=False),
        "hypergradient": lambda: hypergradient_pass(inputs, options, tangents),
        "characteristics": lambda: characteristics_pass(inputs, torch.float32, NEIGHBOURS),
    }
    for name, part in parts.items():
        with recording(execute=False, architecture=architecture) as launches:
            part()
        yield name, launches


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def inputs_of(shape: Shape) -> LossInputs:
    n, c, a = shape.samples, shape.classes, shape.features
    sigma = meta(c, a, a) if shape.structure == "full" else meta(c, a)
    labels = meta(n, dtype=torch.int64)
    return LossInputs(meta(n, a), meta(c, a), meta(c), labels, sigma, meta(n), meta(c))


def options_of(shape: Shape) -> LossOptions:
    return LossOptions(0.5, 1.0, shape.ignore_index, "mean")


def loss_pass(inputs: LossInputs, options: LossOptions, needs: LossNeeds, streams: bool) -> None:
    """Forward, with the update of the statistics where it streams, and backward."""
    passes = triton_backend()
    loss, saved = passes.loss_forward(
        inputs, options, needs, _statistics(inputs) if streams else None
    )
    if any(needs):
        passes.loss_backward(inputs, options, saved, torch.empty_like(loss), needs)


def update_pass(inputs: LossInputs) -> None:
    if inputs.covariance is not None:
        state = _statistics(inputs)
        triton_backend().covariance_update(
            inputs.covariance, state.mean, state.count, inputs.features, inputs.labels
        )


def hypergradient_pass(inputs: LossInputs, options: LossOptions, tangents: HeadTangents) -> None:
    """With the step of Σ along it, where there is one."""
    passes, sigma = triton_backend(), inputs.covariance
    _, sums = passes.hypergradient(inputs, options, tangents, sigma is not None)
    if sigma is not None:
        passes.covariance_step(sigma, inputs.weight, tangents.weight, sums, 0.1)


def characteristics_pass(inputs: LossInputs, dtype: torch.dtype, neighbours: int) -> None:
    """With logits of this dtype."""
    logits = meta(len(inputs.features), len(inputs.weight), dtype=dtype)
    triton_backend().characteristics(
        inputs.features, logits, inputs.labels, inputs.weight, neighbours
    )


def _statistics(inputs: LossInputs) -> ClassStatistics:
    assert inputs.covariance is not None
    mean = meta(*inputs.weight.shape, dtype=inputs.covariance.dtype)
    return ClassStatistics(mean, meta(len(mean), dtype=torch.int64))


def backend_step(
    inputs: LossInputs, options: LossOptions, stream: ClassStatistics
) -> Callable[[], object]:
    """A training step of the backend alone: autograd's own thread would hide the backward."""
    passes, one = triton_backend(), torch.ones((), device=inputs.weight.device)

    def step() -> object:
        _, saved = passes.loss_forward(inputs, options, ALL_BUT_SIGMA, stream)
        return passes.loss_backward(inputs, options, saved, one, ALL_BUT_SIGMA)

    return step
