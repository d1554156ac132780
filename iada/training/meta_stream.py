"""The meta batches of the steps to come, by one loader whose workers read ahead."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from iada.utils.distributed import Group, own_part
from iada.utils.loading import batches_at, stream_order


class MetaStream:
    """An endless stream of shuffled passes over the meta set, from some step of the run on.

    What a step gets is a function of the seed and the step, wherever the stream begins, with or
    without workers. Batches of steps that make no meta step are not read.

    Args:
        dataset: the meta set.
        batch_size, seed: of the run. A meta set smaller than a batch is served whole.
        step: of the run, the first.
        needed: whether this step and those after it make a meta step.
        group: each process gets its part of each batch.
        num_workers: of the loader; they stay for the length of the stream.

    Attributes:
        step: whose batch comes next; None at the end.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        step: int,
        needed: Sequence[bool],
        group: Group = None,
        num_workers: int = 0,
    ) -> None:
        count = len(dataset)  # type: ignore[arg-type]
        self._steps = (step + place for place, is_needed in enumerate(needed) if is_needed)
        self.step: int | None = next(self._steps, None)

        def places() -> Iterator[tuple[int, list[int]]]:
            order = stream_order(count, batch_size, seed, step, len(needed))
            for place, rows in enumerate(order):
                if needed[place]:
                    yield step + place, rows[own_part(len(rows), group)]

        loader = batches_at(dataset, places(), num_workers, seed, step)
        self._batches = iter(loader)

    def __next__(self) -> Any:
        """The batch of `step`, on the CPU."""
        batch = next(self._batches)
        self.step = next(self._steps, None)
        return batch
