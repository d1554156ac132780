"""CelebA (Liu et al., 2015): hair colour, with the sex in the picture as the spurious attribute."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from iada.experiments.datasets.files import (
    DAMAGED,
    at_line,
    check_image_file,
    first_file,
    folder_at,
    integer,
    lines_of,
    missing,
    rows_of,
)
from iada.experiments.datasets.labelled import Labelled
from iada.experiments.datasets.waterbirds import grouped_parts
from iada.utils.checks import refusal

CLASSES = ("not blond", "blond")
GROUPS = tuple(f"{hair}, {sex}" for hair in CLASSES for sex in ("female", "male"))
IMAGE_FOLDERS = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")


def read_celeba(path: str | os.PathLike) -> dict[str, Labelled]:
    """CelebA's three parts, by path: Blond_Hair, in groups with Male (class · 2 + male).

    path: the folder of `list_attr_celeba` and `list_eval_partition`, both as .txt (the authors')
    or .csv (Kaggle's), and of `img_align_celeba`.
    """
    folder = folder_at(path, "list_attr_celeba, list_eval_partition and img_align_celeba")
    attributes = first_file(
        folder, ["list_attr_celeba.txt", "list_attr_celeba.csv"], "the table of attributes"
    )
    partition = first_file(
        folder, ["list_eval_partition.txt", "list_eval_partition.csv"], "the table of parts"
    )
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise missing(folder / "img_align_celeba", "the aligned images", "unpack them there")
    splits = _splits(partition)
    rows = []
    for line, name, hair, male in _attributes(attributes):
        where = at_line(attributes, line)
        if name not in splits:
            raise refusal(where, f"an image of {partition.name}", name, DAMAGED)
        check_image_file(images / name, where)
        rows.append((images / name, hair, male, splits.pop(name)))
    if splits:
        expected = f"attributes of the {len(rows) + len(splits)} images of {partition.name}"
        raise refusal(str(attributes), expected, f"none of {next(iter(splits))}", DAMAGED)
    return grouped_parts(rows, CLASSES, GROUPS, attributes)


def _splits(file: Path) -> dict[str, int]:
    """The part of each image: 0, 1 or 2."""
    part_of_image: dict[str, int] = {}
    rows: Iterator[tuple[int, Sequence[str]]]
    if file.suffix == ".csv":
        columns = ["image_id", "partition"]
        rows = ((line, [row[name] for name in columns]) for line, row in rows_of(file, columns))
    else:
        rows = ((line, text.split()) for line, text in enumerate(lines_of(file), 1))
    for line, fields in rows:
        where = at_line(file, line)
        if len(fields) != 2:
            raise refusal(where, "an image and its part", " ".join(fields), DAMAGED)
        name, split = fields
        if name in part_of_image:
            raise refusal(where, "each image once", f"{name} again", DAMAGED)
        part_of_image[name] = integer(split, range(3), "a part, 0, 1 or 2", where)
    return part_of_image


def _attributes(file: Path) -> Iterator[tuple[int, str, int, int]]:
    """(line, image, Blond_Hair, Male), the attributes as 0 or 1."""
    attributes = ["Blond_Hair", "Male"]
    seen: set[str] = set()
    for line, name, values in (
        _csv_rows(file, attributes) if file.suffix == ".csv" else _text_rows(file, attributes)
    ):
        where = at_line(file, line)
        if name in seen:
            raise refusal(where, "each image once", f"{name} again", DAMAGED)
        seen.add(name)
        signs = [
            integer(value, (-1, 0, 1), f"{column}, 1 or -1", where)
            for column, value in zip(attributes, values, strict=True)
        ]
        yield line, name, int(signs[0] == 1), int(signs[1] == 1)


def _csv_rows(file: Path, attributes: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    for line, row in rows_of(file, ["image_id", *attributes]):
        yield line, row["image_id"], [row[name] for name in attributes]


def _text_rows(file: Path, attributes: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    """The authors' form: how many images, the names of the attributes, a line for each image."""
    lines = lines_of(file)
    count = integer(lines[0].strip(), range(1, 2**31), "the number of images", at_line(file, 1))
    columns = lines[1].split() if len(lines) > 1 else []
    absent = [name for name in attributes if name not in columns]
    if absent:
        where = at_line(file, 2)
        raise refusal(where, f"attributes with {', '.join(attributes)}", f"no {absent[0]}", DAMAGED)
    if len(lines) - 2 != count:
        expected = f"{count} images, as its first line says"
        raise refusal(str(file), expected, str(len(lines) - 2), DAMAGED)
    positions = [columns.index(name) + 1 for name in attributes]
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if len(fields) != len(columns) + 1:
            expected = f"an image and {len(columns)} attributes"
            raise refusal(at_line(file, number), expected, f"{len(fields)} fields", DAMAGED)
        yield number, fields[0], [fields[position] for position in positions]
