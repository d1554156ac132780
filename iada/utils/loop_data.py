"""What a training loop of one's own needs of its data: an endless meta stream, and indices."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from iada.utils.checks import argument_error
from iada.utils.loading import check_dataset, check_item, groups_of, labels_of

Batch = TypeVar("Batch")


def endless(loader: Iterable[Batch], first_epoch: int = 0) -> Iterator[Batch]:
    """The batches of `loader` without end: it is read anew, and so shuffled anew, each time.

    Examples:
        >>> for batch, meta_batch in zip(loader, iada.endless(meta_loader)):
        ...     result = meta.step(batch, meta_batch)

    `zip` with the loader itself would end with the shorter of the two.

    Args:
        loader: a DataLoader, or whatever can be read again. A `set_epoch` that it, its sampler or
            its batch sampler has (a DistributedSampler's) is called with the number of the pass.
        first_epoch: the number of the first pass.

    Raises:
        ValueError: an iterator; and an empty loader, once a batch is asked for.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        remedy = "pass the loader itself, without iter()"
        raise argument_error("loader", "a DataLoader", f"a {type(loader).__name__}", remedy)
    return _passes(loader, first_epoch)


def _passes(loader: Iterable[Batch], epoch: int) -> Iterator[Batch]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler)
    parts = [loader, *samplers, getattr(batch_sampler, "sampler", None)]
    shuffled = {id(part): part for part in parts if hasattr(part, "set_epoch")}
    while True:
        for part in shuffled.values():
            part.set_epoch(epoch)  # type: ignore[union-attr]
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            remedy = "check the data set's size, and drop_last=True with a large batch_size"
            raise argument_error("loader", "at least one batch", "none", remedy)
        epoch += 1


class Indexed(Dataset):
    """A map-style data set of (input, label) as (input, label, index).

    The index lets `iada.MetaIADA` with `memory=iada.TrainingMemory(C, N)` follow each sample from
    epoch to epoch. `iada.Trainer` adds it by itself.

    Examples:
        >>> data = iada.Indexed(train_set)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=100, shuffle=True)

    Args:
        dataset: of (input, label) items; the input may be a dict of tensors.

    Raises:
        ValueError: no map-style data set; and on reading, items that are no pairs.
    """

    def __init__(self, dataset: Dataset) -> None:
        check_dataset("dataset", dataset)
        self.dataset = dataset

    @property
    def labels(self) -> Tensor | None:
        """The labels (N) int64 where the data set has them at hand; else None."""
        return labels_of(self.dataset)

    @property
    def groups(self) -> Tensor | None:
        """The groups (N) int64 of a data set that has them; else None."""
        return groups_of(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        index = range(len(self))[index]  # counts negative ones from the end
        item = self.dataset[index]
        check_item(item)
        if len(item) != 2:
            remedy = "reduce them to two; a data set that gives its index needs no wrapper"
            raise argument_error("dataset", "items (input, label)", f"{len(item)} parts", remedy)
        return item[0], item[1], index
