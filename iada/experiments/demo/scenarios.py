"""scikit-learn's bundled digits (8×8 scans, 10 classes), split by seed and then made worse.

Of each class: 50 images for the test, 20 for validation (settings were chosen on these only),
10 for the clean and balanced meta set, and 94 to train on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iada.utils.loading import TensorData

NUM_CLASSES = 10
TEST, VALIDATION, META, TRAIN = 50, 20, 10, 94  # images of each class
IMBALANCE = 47  # largest class to smallest: 94 images to 2
NOISE = 0.4

SCENARIOS = {
    "long-tail": f"long tail {IMBALANCE}:1",
    "noise": f"{NOISE:.0%} of the training labels flipped",
}


@dataclass(frozen=True)
class Split:
    """One seed's data. flipped (N) marks the training labels that are wrong."""

    train: TensorData
    meta: TensorData
    validation: TensorData
    test: TensorData
    flipped: Tensor

    def with_meta(self) -> TensorData:
        """Training and meta images together: the meta set is labelled data too."""
        return TensorData(
            torch.cat([self.train.inputs, self.meta.inputs]),
            torch.cat([self.train.labels, self.meta.labels]),
        )


def make_split(scenario: str, seed: int) -> Split:
    """The scenario's data, a function of its name and the seed alone."""
    from sklearn.datasets import load_digits

    if scenario not in SCENARIOS:
        raise ValueError(
            f"scenario: expected one of {', '.join(SCENARIOS)}, got {scenario!r}; pass one of these"
        )
    digits = load_digits()
    images = torch.from_numpy(digits.data / 16.0)  # float64 in [0, 1]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Tensor]] = {"test": [], "validation": [], "meta": [], "train": []}
    for c in range(NUM_CLASSES):
        own = torch.from_numpy(rng.permutation(np.flatnonzero(digits.target == c)))
        kept = long_tail_size(c) if scenario == "long-tail" else TRAIN
        sizes = [TEST, VALIDATION, META, kept, len(own) - TEST - VALIDATION - META - kept]
        for part, chosen in zip(rows.values(), own.split(sizes), strict=False):
            part.append(chosen)
    test, validation, meta, train = (torch.cat(part) for part in rows.values())
    train_labels, flipped = labels[train], torch.zeros(len(train), dtype=torch.bool)
    if scenario == "noise":
        train_labels, flipped = flip_labels(train_labels, NOISE, rng)
    return Split(
        TensorData(images[train], train_labels),
        TensorData(images[meta], labels[meta]),
        TensorData(images[validation], labels[validation]),
        TensorData(images[test], labels[test]),
        flipped,
    )


def long_tail_size(c: int) -> int:
    """Class c keeps int(n_max · f^(c/(C−1))) images, class order kept."""
    return int(TRAIN * (1 / IMBALANCE) ** (c / (NUM_CLASSES - 1)) + 1e-9)


def flip_labels(labels: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A share of each class's labels turned into one other class; and which they are."""
    others = (np.arange(NUM_CLASSES) + rng.integers(1, NUM_CLASSES, NUM_CLASSES)) % NUM_CLASSES
    noisy, flipped = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    for c in range(NUM_CLASSES):
        own = np.flatnonzero(labels.numpy() == c)
        chosen = torch.from_numpy(rng.permutation(own)[: round(share * len(own))])
        noisy[chosen] = int(others[c])
        flipped[chosen] = True
    return noisy, flipped
