"""Data sets made out of others: Colored MNIST, and a part cut off where there is none."""

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.labelled import Labelled, Parts
from iada.experiments.scenarios.sampling import part_of, pick_evenly
from iada.utils.checks import argument_error, check_count

CLASSES = ("0-4", "5-9")
COLOURS = ("red", "green")
GROUPS = tuple(f"{digits}, {colour}" for digits in CLASSES for colour in COLOURS)
NOISE = 0.25  # share of labels that are wrong, in every part
AGREEMENT = {"train": 0.8, "validation": 0.5, "test": 0.1}  # colour with label
SHARES = {"train": 3, "validation": 1, "test": 2}  # sixths of MNIST's training digits


def colored_mnist(parts: Parts, *, channels: int = 3, seed: int = 0) -> dict[str, Labelled]:
    """MNIST's digits in red and green, the colour agreeing with the label more often than not.

    y = [digit ≥ 5], of which a quarter are turned around; the colour is red for 0 and green for 1
    in 80 % of the training, 50 % of the validation and 10 % of the test digits, and the other one
    else (Arjovsky et al., 2019; Yao et al., 2022). All come from MNIST's 60,000 training digits:
    30,000, 10,000 and 20,000. Groups are y × colour (2y + colour).

    channels: 3 (red, green and an empty blue, for models made for pictures) or 2 (red and green).
    """
    if channels not in (2, 3):
        raise argument_error("channels", "2 or 3", repr(channels), "pass 3 for a usual image model")
    digits = part_of(parts, "train")
    if not isinstance(digits.inputs, Tensor) or digits.inputs.shape[1] != 1:
        remedy = "read them by read_mnist"
        raise argument_error("parts", "MNIST's digits (N, 1, 28, 28)", "others", remedy)
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(len(digits)))
    ends = np.cumsum(list(SHARES.values())) * len(digits) // sum(SHARES.values())
    made = {}
    for part, rows in zip(SHARES, order.tensor_split(ends[:-1].tolist()), strict=True):
        true = (digits.labels[rows] >= 5).long()
        labels = true ^ _some(len(rows), NOISE, rng)
        colours = labels ^ _some(len(rows), 1 - AGREEMENT[part], rng)
        grey = digits.inputs[rows][:, 0]
        images = torch.zeros((len(rows), channels, *grey.shape[1:]), dtype=torch.uint8)
        images[torch.arange(len(rows)), colours] = grey
        made[part] = Labelled(images, labels, CLASSES, 2 * labels + colours, GROUPS)
    return made


def _some(count: int, share: float, rng: np.random.Generator) -> Tensor:
    """(count) of 0 and 1, a one with this chance."""
    return torch.from_numpy((rng.random(count) < share).astype(np.int64))


def hold_out(
    parts: Parts, *, name: str = "test", per_class: int, seed: int = 0
) -> dict[str, Labelled]:
    """The parts with `per_class` training samples of each class cut off, as the part `name`.

    For data sets that come without one. Each class keeps one training sample at least.
    """
    check_count("per_class", per_class)
    if name in parts or name not in ("validation", "test"):
        expected = "'validation' or 'test', whichever there is none of"
        raise argument_error("name", expected, repr(name), "use the part that there is")
    train = part_of(parts, "train")
    rng = np.random.default_rng(seed)
    taken, left = pick_evenly(
        train.labels, train.class_names, per_class, rng, "class", "per_class", spare=1
    )
    return {**parts, "train": train.subset(left), name: train.subset(taken)}
