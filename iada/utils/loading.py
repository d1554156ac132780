"""Batches that are a function of (seed, epoch, step), so that a run can resume anywhere."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
)

from iada.utils.checks import argument_error, check_label_values, check_labels, check_tensor
from iada.utils.seeds import preserved, seed_host, seed_of

WholeBatch = tuple[Any, Tensor, Tensor]  # inputs, labels (N) and index (N)


class TensorData(Dataset):
    """Inputs and labels in memory, as (input, label, index) items.

    Examples:
        >>> data = iada.TensorData(torch.zeros(3, 8), torch.tensor([0, 2, 1]))
        >>> len(data), data[1][1:]
        (3, (tensor(2), 1))

    Args:
        inputs: (N, ...), any dtype.
        labels: class indices, (N), any integer dtype.
        groups: each sample's group, (N), any integer dtype, for the methods that know groups.

    Raises:
        ValueError: inputs, labels and groups that do not fit together.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        check_tensor("inputs", inputs, "a tensor (N, ...)")
        check_labels(labels, len(inputs))
        if groups is not None:
            check_tensor("groups", groups, f"integers from 0, ({len(inputs)},)")
        self.inputs, self.labels = inputs, labels.long()
        self.groups = _class_indices([groups], len(inputs))
        if groups is not None and self.groups is None:
            expected = f"an integer from 0 for each sample, ({len(inputs)},)"
            got = f"{groups.dtype} of shape {tuple(groups.shape)}"
            raise argument_error("groups", expected, got, "pass one, or leave groups out")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[index], self.labels[index], index


def as_rows(indices: Sequence[int]) -> Tensor:
    """Rows of a batch, (N) int64; by numpy, which reads a list five times as fast as torch does."""
    return torch.from_numpy(np.array(indices, dtype=np.int64))


@runtime_checkable
class WholeBatches(Protocol):
    """A data set that makes whole batches (inputs, labels, index) faster than sample by sample.

    What it draws follows from the seed, the step and each sample's index alone, so that neither a
    resumed run nor a batch split over ranks changes it. `in_memory` ones are asked in the training
    process itself, others in the workers.
    """

    labels: Tensor | None  # None: class counts have to be told
    in_memory: bool

    def whole_batch(self, seed: int, step: int, indices: Sequence[int]) -> WholeBatch:
        """Inputs, labels (N) and index (N) of these samples at this step of this run."""


def check_dataset(name: str, dataset: Any) -> None:
    """A map-style data set with at least one sample."""
    expected = "a map-style data set of (input, label) items"
    if isinstance(dataset, DataLoader):
        remedy = f"pass its data set, {name}.dataset: order and batches are made here"
        raise argument_error(name, expected, "a DataLoader", remedy)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        remedy = "give it __getitem__ and __len__, or read it into an iada.TensorData"
        raise argument_error(name, expected, f"a {type(dataset).__name__}", remedy)
    if len(dataset) == 0:
        raise argument_error(name, "at least one sample", "none", "check how it was selected")


def labels_of(dataset: Any) -> Tensor | None:
    """The labels (N) int64 of a data set that has them at hand; else None, without reading items.

    Known are integers in an attribute `labels` or `targets` (torchvision), unless a
    target_transform changes them, the second tensor of a TensorDataset, and a Subset or a
    ConcatDataset of these.
    """
    if isinstance(dataset, Subset | ConcatDataset):
        return _of_parts(dataset, labels_of)
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if isinstance(dataset, TensorDataset):
        return _class_indices(dataset.tensors[1:2], len(dataset))
    attributes = [getattr(dataset, name, None) for name in ("labels", "targets")]
    return _class_indices(attributes, len(dataset))


def groups_of(dataset: Any) -> Tensor | None:
    """The groups (N) int64 of a data set that has them; else None.

    Known are integers in an attribute `groups`, and a Subset or a ConcatDataset of these.
    """
    if isinstance(dataset, Subset | ConcatDataset):
        return _of_parts(dataset, groups_of)
    return _class_indices([getattr(dataset, "groups", None)], len(dataset))


def _of_parts(dataset: Subset | ConcatDataset, of: Callable[[Any], Tensor | None]) -> Tensor | None:
    """What `of` gives of the data sets that this one is made of; None where one has none."""
    if isinstance(dataset, Subset):
        values = of(dataset.dataset)
        return None if values is None else values[torch.as_tensor(dataset.indices)]
    parts = [of(part) for part in dataset.datasets]
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _class_indices(candidates: Sequence[Any], count: int) -> Tensor | None:
    """The first that is a class index for each of `count` samples, (N) int64."""
    for candidate in candidates:
        if isinstance(candidate, Tensor | np.ndarray | list | tuple) and len(candidate) == count:
            try:
                labels = torch.as_tensor(candidate)
            except (TypeError, ValueError, RuntimeError):  # names, or rows of several lengths
                continue
            kind = labels.dtype
            if labels.dim() == 1 and not (kind.is_floating_point or kind.is_complex):
                return labels.long()
    return None


def count_classes(dataset: Dataset, num_classes: int) -> Tensor:
    """Samples of each class, (C), if the data set has `labels_of`; else ValueError."""
    labels = labels_of(dataset)
    if labels is not None:
        check_label_values(labels, num_classes, None)
        return torch.bincount(labels, minlength=num_classes)
    expected = (
        f"samples of each class, ({num_classes},), as the data set shows no labels or targets"
    )
    remedy = "pass torch.bincount(training_labels, minlength=C)"
    raise argument_error("class_counts", expected, "None", remedy)


def check_item(item: Any) -> None:
    """One sample as a tuple (input, label, ...)."""
    if isinstance(item, Mapping):
        remedy = "wrap it to give (input, label); the input may be a dict of tensors"
        raise argument_error("dataset", "items (input, label)", "a dict", remedy)
    if not isinstance(item, list | tuple) or len(item) < 2:
        remedy = "return the label with each input"
        raise argument_error("dataset", "items (input, label)", f"a {type(item).__name__}", remedy)


class WithIndex(Dataset):
    """A data set of (input, label, ...) items as (input, label, index); the rest is dropped.

    A batch is asked for as (step, indices), so that each sample's draws follow from its place in
    the run: see `iada.utils.seeds`. For loops of one's own: `iada.Indexed`.
    """

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        item = self.dataset[index]
        check_item(item)
        return item[0], item[1], index

    def __getitems__(self, place: tuple[int, Sequence[int]]) -> list[tuple[Any, Any, int]]:
        step, indices = place
        items = []
        with preserved():
            for index in indices:
                seed_host(seed_of(self.seed, step, index))
                items.append(self[index])
        return items


class Collated(Dataset):
    """A map-style data set of (input, label) whose batches of inputs are made by `collate`.

    For inputs that do not stack: sequences of several lengths, graphs. What the data set draws for
    a sample stays a function of the run's seed, the step and the sample.

    Examples:
        >>> def pad(rows):
        ...     return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        >>> texts = [(torch.arange(1 + k), k % 3) for k in range(6)]
        >>> iada.Collated(texts, pad).whole_batch(0, 0, [0, 3, 2])[0].shape
        torch.Size([3, 4])

    Args:
        dataset: of (input, label) items; whatever follows the label is dropped.
        collate: makes a batch of the list of its inputs: a tensor, or a mapping or sequence of
            tensors with the samples along the first dimension. A Hugging Face tokenizer's `pad`
            takes a list of dicts; pass `partial(tokenizer.pad, return_tensors="pt")`.

    Attributes:
        labels, groups: of the data set where it has them at hand, (N) int64; else None.
        in_memory: whether batches are made in the training process though there are workers; False.

    Raises:
        ValueError: no map-style data set, or `collate` is no function.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any]) -> None:
        check_dataset("dataset", dataset)
        if not callable(collate):
            got = f"a {type(collate).__name__}"
            raise argument_error("collate", "a function of a list of inputs", got, "pass one")
        self.dataset, self.collate = dataset, collate
        self.labels, self.groups = labels_of(dataset), groups_of(dataset)
        self.in_memory = False

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        check_item(item)
        return item[0], item[1]

    def whole_batch(self, seed: int, step: int, indices: Sequence[int]) -> WholeBatch:
        """Inputs as `collate` makes them, labels (N) and index (N) of these samples."""
        items = WithIndex(self.dataset, seed).__getitems__((step, indices))
        labels = default_collate([label for _, label, _ in items])
        return self.collate([row for row, *_ in items]), labels, as_rows(indices)


class _AtStep(Dataset):
    """A `WholeBatches` asked as (step, indices)."""

    def __init__(self, dataset: WholeBatches, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, place: tuple[int, Sequence[int]]) -> WholeBatch:
        return self.dataset.whole_batch(self.seed, *place)


class _AtAnyStep(Dataset):
    """A `TensorData`, which draws nothing, asked as (step, indices)."""

    def __init__(self, dataset: TensorData) -> None:
        self.dataset = dataset

    def __getitems__(self, place: tuple[int, Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        rows = as_rows(place[1])
        return self.dataset.inputs[rows], self.dataset.labels[rows], rows


def batches(
    dataset: Dataset,
    order: Sequence[list[int]],
    num_workers: int = 0,
    seed: int = 0,
    first_step: int = 0,
) -> DataLoader:
    """A loader of (inputs, labels, index) batches in the given order.

    It leaves the global random generators as they were: those belong to the model's dropout. What
    the data set draws from them itself follows from `seed`, the step (`first_step` for the first
    of `order`) and the sample. A `TensorData` itself is served without workers; `WholeBatches`
    make theirs at once.
    """
    places = list(enumerate(order, first_step))
    return batches_at(dataset, places, num_workers, seed, first_step)


def batches_at(
    dataset: Dataset,
    places: Iterable[tuple[int, list[int]]],
    num_workers: int = 0,
    seed: int = 0,
    first_step: int = 0,
) -> DataLoader:
    """The same for (step, indices) at any steps, which are asked for as the loader gets there."""
    if type(dataset) is TensorData:  # a subclass may have its own __getitem__
        served: Dataset = _AtAnyStep(dataset)
        num_workers = 0
    elif isinstance(dataset, WholeBatches):
        served = _AtStep(dataset, seed)
        num_workers = 0 if dataset.in_memory else num_workers
    else:
        served = WithIndex(dataset, seed)
    return DataLoader(
        served,
        batch_sampler=places,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=None if isinstance(served, WithIndex) else _whole,
        generator=torch.Generator().manual_seed(seed_of(seed, first_step)),
        worker_init_fn=_leave_ctrl_c_to_the_loop,
    )


def to_device(part: Any, device: torch.device) -> Any:
    """Tensors, also those in mappings (a tokenizer's output), lists and tuples, on `device`."""
    if isinstance(part, Tensor):
        if device.type == "cuda" and part.device.type == "cpu":
            part = part.pin_memory()  # else the copy waits for the work before it
        return part.to(device, non_blocking=True)
    if isinstance(part, Mapping):
        moved = {key: to_device(value, device) for key, value in part.items()}
        try:
            return type(part)(moved)  # type: ignore[call-arg]
        except TypeError:  # a defaultdict's first argument is another
            return moved
    if isinstance(part, list | tuple):
        values = [to_device(value, device) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    return part


def _leave_ctrl_c_to_the_loop(worker: int) -> None:
    """Else Ctrl-C ends the workers before the step that is to be finished has its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    current, rows = -1, [0]
    for step in range(first_step, first_step + steps):
        batch = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            if place // count != current:
                current = place // count
                rows = torch.randperm(count, generator=_generator(seed, -1 - current)).tolist()
            batch.append(rows[place % count])
        yield batch


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
