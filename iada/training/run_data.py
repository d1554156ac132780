"""The data sets of a run: checked before anything is trained, and known again by their labels."""

import warnings
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from iada.utils.checks import argument_error
from iada.utils.loading import TensorData, check_dataset, check_item, labels_of

Sets = Mapping[str, Dataset | None]  # by the name of the argument


def check_sets(sets: Sets) -> None:
    """ValueError for what is no map-style data set of (input, label) items."""
    for name, dataset in sets.items():
        if dataset is None:
            continue
        check_dataset(name, dataset)
        first = dataset[0] if isinstance(dataset, list | tuple) else dataset
        if isinstance(first, Tensor | np.ndarray):
            got = f"a {type(dataset).__name__}" + (" of arrays" if first is not dataset else "")
            remedy = "wrap it: torch.utils.data.TensorDataset(inputs, labels), of tensors"
            raise argument_error(name, "a data set of (input, label) items", got, remedy)


def check_labels_at_hand(sets: Sets, num_classes: int) -> None:
    """ValueError for labels that are no integers in [0, C), where a data set shows its own."""
    for name, dataset in sets.items():
        _check_kind(f"{name}'s labels", dataset)
        labels = None if dataset is None else labels_of(dataset)
        if labels is not None:
            _check_range(f"{name}'s labels", dataset, labels, num_classes)


def _check_kind(name: str, dataset: Any) -> None:
    """Of a TensorDataset, whose second tensor they are."""
    if isinstance(dataset, Subset):
        _check_kind(name, dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _check_kind(name, part)
    elif type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        labels = dataset.tensors[1]
        kind = labels.dtype
        whole = not (kind.is_floating_point or kind.is_complex or kind is torch.bool)
        if labels.dim() == 1 and whole:
            return
        remedy = "convert them: labels.long()"
        if labels.dim() > 1:
            remedy = "pass labels.argmax(1) of one-hot rows, labels.squeeze(1).long() of one column"
        got = f"{str(kind).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        raise argument_error(name, f"integers, ({len(labels)},)", got, remedy)


def _check_range(name: str, dataset: Any, labels: Tensor, num_classes: int) -> None:
    """Labels (N) in [0, C)."""
    wrong = (labels < 0) | (labels >= num_classes)
    row = int(wrong.int().argmax())
    if not wrong[row]:
        return
    item = dataset[row]
    check_item(item)
    if int(item[1]) == labels[row]:  # else the data set serves others than it shows
        expected = f"class indices in [0, {num_classes})"
        remedy = "number the classes from 0, or give the head one row for each class"
        raise argument_error(name, expected, f"{int(labels[row])} at row {row}", remedy)


def check_meta_set(train_set: Dataset, meta_set: Dataset | None) -> None:
    """ValueError if a method that needs one has none; a warning where it is the training set."""
    if meta_set is None:
        remedy = "pass one, or choose another method"
        raise argument_error("meta_set", "a small clean data set", "None", remedy)
    same = meta_set is train_set
    mine, theirs = _inputs(meta_set), _inputs(train_set)
    if mine is not None and theirs is not None:
        same |= mine.data_ptr() == theirs.data_ptr() and mine.shape == theirs.shape
    if same:
        warnings.warn(
            "meta_set: expected a small clean set of its own, got train_set, whose labels it is to "
            "judge; take its samples out of train_set",
            stacklevel=3,
        )


def _inputs(dataset: Dataset) -> Tensor | None:
    """All of them, (N, ...), where they are in memory."""
    if isinstance(dataset, TensorData):
        return dataset.inputs
    return dataset.tensors[0] if isinstance(dataset, TensorDataset) else None


def digest_of(dataset: Dataset | None) -> str | None:
    """32 hexadecimal digits of the labels in their order; None where they are not at hand."""
    labels = None if dataset is None else labels_of(dataset)
    if labels is None:
        return None
    return blake2b(labels.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def check_same_labels(digests: dict[str, str | None], former: dict[str, str | None]) -> None:
    """ValueError for data sets that had others: `digest_of` by the name of the argument."""
    for name, digest in digests.items():
        known = former.get(name)
        if None not in (known, digest) and known != digest:
            expected = "the labels that the checkpoint's run had, in their order"
            remedy = "put the data set back as it was, or choose another folder"
            raise argument_error(name, expected, "others", remedy)
