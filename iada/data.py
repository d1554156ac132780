"""Batches whose order is a function of (seed, epoch, step), so that a run can resume anywhere."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iada.validation import check_labels, check_tensor


class TensorData(Dataset):
    """Inputs (N, ...) and labels (N) in memory, served as (inputs, labels, index) batches."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        check_tensor("inputs", inputs, "a tensor (N, ...)")
        check_labels(labels, len(inputs))
        self.inputs, self.labels = inputs, labels.long()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[index], self.labels[index], index

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return self.inputs[rows], self.labels[rows], rows


class WithIndex(Dataset):
    """A data set of (input, label, ...) items as (input, label, index); the rest is dropped."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        item = self.dataset[index]
        return item[0], item[1], index


def batches(
    dataset: Dataset, order: Sequence[list[int]], num_workers: int = 0, seed: int = 0
) -> DataLoader:
    """A loader of (inputs, labels, index) batches in the given order.

    It draws nothing from torch's global random state, which belongs to the model's dropout;
    `seed` is that of the workers. A `TensorData` itself is served without workers.
    """
    own = torch.Generator().manual_seed(seed % 2**63)
    if type(dataset) is TensorData:  # a subclass may have its own __getitem__
        return DataLoader(dataset, batch_sampler=order, collate_fn=_whole, generator=own)
    indexed = WithIndex(dataset)
    return DataLoader(indexed, batch_sampler=order, num_workers=num_workers, generator=own)


def _whole(batch: Any) -> Any:
    return batch


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """A permutation of range(count) in batches of nearly equal size, none above `batch_size`.

    Equal parts rather than a small remainder, whose batch statistics would be poor.
    """
    permutation = torch.randperm(count, generator=_generator(seed, epoch))
    parts = max(1, -(-count // batch_size))
    return [part.tolist() for part in permutation.tensor_split(parts)]


def stream_order(
    count: int, batch_size: int, seed: int, first_step: int, steps: int
) -> Iterator[list[int]]:
    """Batches first_step … first_step + steps − 1 of an endless stream of permutations."""
    if batch_size >= count:
        for _ in range(steps):
            yield list(range(count))
        return
    current, rows = -1, torch.empty(0, dtype=torch.int64)
    for step in range(first_step, first_step + steps):
        batch = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            if place // count != current:
                current = place // count
                rows = torch.randperm(count, generator=_generator(seed, -1 - current))
            batch.append(int(rows[place % count]))
        yield batch


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
