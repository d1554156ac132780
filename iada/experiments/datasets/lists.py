"""List files, a line `path label` for each image: ImageNet-LT, Places-LT, iNaturalist 2018."""

import os
from pathlib import Path

import torch

from iada.experiments.datasets.files import (
    DAMAGED,
    at_line,
    check_image_file,
    folder_at,
    integer,
    lines_of,
    missing,
)
from iada.experiments.datasets.labelled import Labelled, check_every_class
from iada.utils.checks import refusal

ENDINGS = {"train": "_train.txt", "validation": "_val.txt", "test": "_test.txt"}


def read_lists(
    path: str | os.PathLike,
    images: str | os.PathLike | None = None,
    num_classes: int | None = None,
) -> dict[str, Labelled]:
    """The images named in `*_train.txt`, `*_val.txt` and `*_test.txt`, by path.

    path: the folder of the lists (ImageNet_LT_train.txt, Places_LT_train.txt,
    iNaturalist18_train.txt, …); of each kind there is one. images: the folder that their paths
    start from; None takes `path`. num_classes: None takes the training list's largest label + 1.
    """
    folder = folder_at(path, "*_train.txt and *_val.txt or *_test.txt")
    root = folder if images is None else folder_at(images, "the images")
    lists = {part: _one_list(folder, ending) for part, ending in ENDINGS.items()}
    if lists["train"] is None:
        raise missing(folder / "*_train.txt", "the list of training images", f"look into {folder}")
    if lists["validation"] is None and lists["test"] is None:
        raise missing(folder / "*_test.txt", "a list *_val.txt or *_test.txt", "add one of them")
    parts: dict[str, Labelled] = {}
    names: tuple[str, ...] | None = None
    for part, file in lists.items():
        if file is None:
            continue
        paths, labels = _entries(file, root, len(names) if names else num_classes)
        names = names or tuple(str(c) for c in range(num_classes or max(labels) + 1))
        parts[part] = Labelled(paths, torch.tensor(labels, dtype=torch.int64), names)
    check_every_class(parts["train"], "the training list", lists["train"])
    return parts


def _one_list(folder: Path, ending: str) -> Path | None:
    matches = sorted(folder.glob(f"*{ending}"))
    if len(matches) > 1:
        got = ", ".join(file.name for file in matches)
        raise refusal(str(folder), f"one *{ending}", got, "keep one data set's lists in a folder")
    return matches[0] if matches else None


def _entries(file: Path, root: Path, num_classes: int | None) -> tuple[list[Path], list[int]]:
    """Paths and labels of a list file; every line is checked."""
    allowed = range(num_classes or 2**31)
    expected = f"a path and a label in [0, {num_classes})" if num_classes else "a path and a label"
    paths: list[Path] = []
    labels: list[int] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines_of(file), 1):
        where = at_line(file, number)
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2:
            raise refusal(where, expected, repr(line), DAMAGED)
        name, label = fields[0].strip(), fields[1]
        if name in seen:
            got = f"{name} of line {seen[name]} again"
            raise refusal(where, "each image once", got, "take one of the lines away")
        seen[name] = number
        labels.append(integer(label, allowed, expected, where))
        paths.append(root / name)
        check_image_file(paths[-1], where)
    return paths, labels
