"""What the views of a data set have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class View(Dataset):
    """Samples as a trainer takes them: `WholeBatches`, and one sample at a time.

    Attributes:
        labels: (N).
        in_memory: whether batches are made quickly enough to be made in the training process.
        augments: whether a sample depends on what is drawn.
    """

    labels: Tensor
    in_memory: bool = False
    augments: bool = False

    def whole_batch(
        self, seed: int, step: int, indices: Sequence[int]
    ) -> tuple[Any, Tensor, Tensor]:
        """Inputs, labels and index of these samples at this step: see `WholeBatches`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One sample; what its augmentation draws follows torch's global generator."""
        step = int(torch.randint(2**62, ())) if self.augments else 0
        inputs, labels, _ = self.whole_batch(0, step, [index])
        if isinstance(inputs, Mapping):
            return {name: values[0] for name, values in inputs.items()}, int(labels[0])
        return inputs[0], int(labels[0])
