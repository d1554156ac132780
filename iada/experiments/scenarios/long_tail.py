"""A long tail cut out of a balanced data set: CIFAR10-LT and CIFAR100-LT."""

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.labelled import Labelled, Parts
from iada.experiments.scenarios.sampling import part_of, rows_by_key, training_pieces
from iada.experiments.scenarios.split import Split, requested
from iada.utils.checks import argument_error, check_choice, check_count

# The published ways to make CIFAR-LT, by name; at 100:1 they leave 12,406, 12,380 and 25,250 images
# of CIFAR-10, and 10,847, 10,626 and 25,250 of CIFAR-100.
CONVENTIONS = {
    "ldam": "n_max 5000 or 500 (Cui et al., 2019; Cao et al., 2019, LDAM; Menon et al., 2021)",
    "metasaug": "10 meta images of each class taken out of train first, so n_max 4990 or 490 "
    "(Shu et al., 2019, Meta-Weight-Net; Jamal et al., 2020; Li et al., 2021, MetaSAug)",
    "step": "the first half of the classes whole, the others all of n_max/ratio "
    "(Buda et al., 2018; Cao et al., 2019)",
}


def class_sizes(
    largest: int, ratio: float, num_classes: int, convention: str = "ldam"
) -> list[int]:
    """Images of each class, the class order kept: int(n_max · f^(i/(C−1))) with f = 1/ratio.

    "step" gives n_max to the first half of the classes and int(n_max/ratio) to the others.
    """
    share = 1 / ratio
    if convention == "step":
        half = num_classes // 2
        return [largest] * half + [int(largest * share)] * (num_classes - half)
    return [int(largest * share ** (c / max(1, num_classes - 1))) for c in range(num_classes)]


def long_tail(
    parts: Parts,
    *,
    ratio: float,
    convention: str = "ldam",
    meta_per_class: int = 10,
    largest: int | None = None,
    seed: int = 0,
) -> Split:
    """Train with `ratio` times as many images of the first class as of the last; test as it is.

    The meta set has `meta_per_class` images of each class (0: none). By "metasaug" they are taken
    out of train before the tail is cut, and n_max shrinks by as many. By the others they come from
    the images that the tail leaves over; a class that is kept whole has none left over, so there
    they are taken out of its training images, and the record's "meta_out_of_train" says how many.

    largest: images of a class before any are taken out, n_max; None takes N/C. ValueError where a
    class has fewer than it is to keep.
    """
    check_choice("convention", convention, [*CONVENTIONS])
    if not ratio >= 1:
        remedy = "pass largest : smallest class"
        raise argument_error("ratio", "a number from 1 on", repr(ratio), remedy)
    check_count("meta_per_class", meta_per_class, 0)
    train, _ = part_of(parts, "train"), part_of(parts, "test")
    if largest is None:
        largest = len(train) // train.num_classes
    check_count("largest", largest)
    before = meta_per_class if convention == "metasaug" else 0
    sizes = class_sizes(largest - before, ratio, train.num_classes, convention)
    rng = np.random.default_rng(seed)
    train_rows, meta, moved = _cut(train, sizes, meta_per_class, before, rng)
    asked = {"ratio": ratio, "convention": convention, "meta_per_class": meta_per_class}
    request = requested("long-tail", seed, **asked, largest=largest) | {"meta_out_of_train": moved}
    return Split.of(parts, training_pieces(parts, train_rows, meta), request)


def _cut(
    train: Labelled, sizes: list[int], each: int, before: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Rows to train on, rows of the meta set, and how many of these each class had to give up."""
    train_rows, meta, moved = [], [], {}
    for c, class_rows in enumerate(rows_by_key(train.labels, train.num_classes, rng)):
        name = train.class_names[c]
        if len(class_rows) < sizes[c] + before:
            expected = f"at least {sizes[c] + before} images for this tail"
            remedy = "pass a smaller `largest`, or another data set"
            raise argument_error(f"class {name!r}", expected, str(len(class_rows)), remedy)
        lacking = max(0, each + sizes[c] - len(class_rows))
        if sizes[c] - lacking < 1:
            expected = f"{each} images for the meta set and at least one to train on"
            remedy = "ask for a smaller meta_per_class or ratio"
            raise argument_error(f"class {name!r}", expected, sizes[c] - lacking + each, remedy)
        if lacking:
            moved[name] = lacking
        meta.append(class_rows[:each])
        train_rows.append(class_rows[each : each + sizes[c] - lacking])
    return torch.cat(train_rows).sort().values, torch.cat(meta).sort().values, moved
