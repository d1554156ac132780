"""What a classifier gives on a data set, and its accuracy on each class."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.utils.checks import check_labels
from iada.utils.loading import batches, check_dataset, to_device


class Outputs(NamedTuple):
    """Features (N, A), logits (N, C) and labels (N) of a data set's samples."""

    features: Tensor
    logits: Tensor
    labels: Tensor


@torch.no_grad()
def class_accuracy(given: Iterable[Outputs], num_classes: int) -> Tensor:
    """The share of right answers in each class, (C) float64; NaN for a class without samples.

    given: of `by_batch`.
    """
    counts = torch.zeros(2, num_classes, dtype=torch.float64)  # right ones, and all
    for _, logits, labels in given:
        hit = (logits.argmax(dim=1) == labels).cpu().double()
        counts.index_add_(1, labels.cpu(), torch.stack([hit, torch.ones_like(hit)]))
    return counts[0] / counts[1]


@torch.no_grad()
def outputs(
    backbone: nn.Module,
    head: nn.Linear,
    dataset: Dataset,
    batch_size: int = 512,
    num_workers: int = 0,
    rows: Tensor | None = None,
) -> Outputs:
    """What the classifier gives in evaluation mode, for metrics and diagnostics; on the CPU.

    num_workers: of the loader. rows: the samples to look at, in this order; None for all.
    """
    given = by_batch(backbone, head, dataset, batch_size, num_workers, rows)
    found = [[tensor.cpu() for tensor in batch] for batch in given]
    return Outputs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def by_batch(
    backbone: nn.Module,
    head: nn.Linear,
    dataset: Dataset,
    batch_size: int = 512,
    num_workers: int = 0,
    rows: Tensor | None = None,
    seed: int = 0,
) -> Iterator[Outputs]:
    """Of each batch, in evaluation mode, on the head's device; arguments as of `outputs`.

    seed: of what the data set draws.
    """
    check_dataset("dataset", dataset)
    chosen = torch.arange(len(dataset)) if rows is None else rows  # type: ignore[arg-type]
    order = [part.tolist() for part in chosen.split(batch_size)]
    with evaluating(backbone, head):
        for batch in batches(dataset, order, num_workers, seed):
            inputs, labels, *_ = to_device(tuple(batch), head.weight.device)
            features = backbone(inputs)
            check_labels(labels, len(features))
            yield Outputs(features, head(features), labels.long())


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode while inside; afterwards each module in the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
