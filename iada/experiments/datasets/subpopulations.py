"""Data sets with groups: Waterbirds, CelebA and CivilComments.

Sagawa et al., 2020; Liu et al., 2015; Borkan et al., 2019, as WILDS has it (Koh et al., 2021).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from iada.experiments.datasets import files
from iada.experiments.datasets.files import at_line, damaged, integer
from iada.experiments.datasets.labelled import Labelled, check_every_class

PARTS = ("train", "validation", "test")
BIRDS = ("landbird", "waterbird")
HAIR = ("not blond", "blond")
TOXICITY = ("non-toxic", "toxic")
IMAGE_FOLDERS = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")
IDENTITIES = ["male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white"]
MEMBERS = tuple(f"{label}, {identity}" for label in TOXICITY for identity in IDENTITIES)
COMMENT_PARTS = {"train": "train", "val": "validation", "test": "test"}


def read_waterbirds(path: str | os.PathLike) -> dict[str, Labelled]:
    """Waterbirds' three parts, by path; groups are bird × background, (class · 2 + place).

    path: the folder of `metadata.csv` (columns img_filename, y, split, place) and of the images.
    """
    folder = files.folder_at(path, "metadata.csv and the images")
    file = files.first_file(folder, ["metadata.csv"], "the table of images")
    rows: list[tuple[Path, int, int, int]] = []
    for line, row in files.rows_of(file, ["img_filename", "y", "split", "place"]):
        where = at_line(file, line)
        bird = integer(row["y"], range(2), "y, 0 (landbird) or 1 (waterbird)", where)
        place = integer(row["place"], range(2), "place, 0 (land) or 1 (water)", where)
        split = integer(row["split"], range(3), "split, 0, 1 or 2", where)
        files.check_image_file(folder / row["img_filename"], where)
        rows.append((folder / row["img_filename"], bird, place, split))
    return _image_parts(rows, BIRDS, ("land", "water"), file)


def read_celeba(path: str | os.PathLike) -> dict[str, Labelled]:
    """CelebA's three parts, by path: Blond_Hair, in groups with Male (class · 2 + male).

    path: the folder of `list_attr_celeba` and `list_eval_partition`, both as .txt (the authors')
    or .csv (Kaggle's), and of `img_align_celeba`.
    """
    folder = files.folder_at(path, "list_attr_celeba, list_eval_partition and img_align_celeba")
    attributes, partition = (
        files.first_file(folder, [f"{stem}.txt", f"{stem}.csv"], f"the table of {content}")
        for stem, content in (("list_attr_celeba", "attributes"), ("list_eval_partition", "parts"))
    )
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise files.missing(folder / "img_align_celeba", "the aligned images", "unpack them there")
    splits = {
        name: integer(split, range(3), "a part, 0, 1 or 2", where)
        for where, name, (split,) in _celeba_rows(partition, ["partition"])
    }
    rows = []
    columns = ["Blond_Hair", "Male"]
    for where, name, values in _celeba_rows(attributes, columns):
        if name not in splits:
            raise damaged(where, f"an image of {partition.name}", name)
        hair, male = (
            int(integer(value, (-1, 0, 1), f"{column}, 1 or -1", where) == 1)
            for column, value in zip(columns, values, strict=True)
        )
        files.check_image_file(images / name, where)
        rows.append((images / name, hair, male, splits.pop(name)))
    if splits:
        expected = f"attributes of the {len(rows) + len(splits)} images of {partition.name}"
        raise damaged(attributes, expected, f"none of {next(iter(splits))}")
    return _image_parts(rows, HAIR, ("female", "male"), attributes)


def _celeba_rows(file: Path, columns: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(where it stands, image, values in these columns) of each line; no image comes twice."""
    seen: set[str] = set()
    read = _csv_rows if file.suffix == ".csv" else _text_rows
    for line, name, values in read(file, columns):
        where = at_line(file, line)
        if name in seen:
            raise damaged(where, "each image once", f"{name} again")
        seen.add(name)
        yield where, name, values


def _csv_rows(file: Path, columns: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    for line, row in files.rows_of(file, ["image_id", *columns]):
        yield line, row["image_id"], [row[name] for name in columns]


def _text_rows(file: Path, wanted: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    """The authors' form, a line an image; the attributes have their number and names above."""
    lines, columns, first = files.lines_of(file), wanted, 0
    content = "its part"
    if wanted != ["partition"]:
        columns, first = _text_header(file, lines, wanted), 2
        content = f"{len(columns)} attributes"
    for number, line in enumerate(lines[first:], first + 1):
        name, *values = line.split() or [""]
        if len(values) != len(columns):
            got = f"{len(line.split())} fields: {line}"
            raise damaged(at_line(file, number), f"an image and {content}", got)
        yield number, name, [values[columns.index(column)] for column in wanted]


def _text_header(file: Path, lines: list[str], wanted: list[str]) -> list[str]:
    """The names of the attributes; there are as many lines as the first one says."""
    count = integer(lines[0].strip(), range(1, 2**31), "the number of images", at_line(file, 1))
    columns = lines[1].split() if len(lines) > 1 else []
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise damaged(at_line(file, 2), f"attributes with {', '.join(wanted)}", f"no {absent[0]}")
    if len(lines) - 2 != count:
        raise damaged(file, f"{count} images, as its first line says", len(lines) - 2)
    return columns


def _image_parts(
    rows: list[tuple[Path, int, int, int]],
    classes: Sequence[str],
    attributes: Sequence[str],
    file: Path,
) -> dict[str, Labelled]:
    """The parts of (path, label, attribute, split) rows; groups are class × two attributes."""
    parts = {}
    for number, part in enumerate(PARTS):
        in_part = [row for row in rows if row[3] == number]
        if not in_part:
            raise damaged(file, f"rows of {part} (split {number})", "none")
        paths, labels, values, _ = zip(*in_part, strict=True)
        label = torch.tensor(labels)
        groups = 2 * label + torch.tensor(values)
        names = _group_names(classes, attributes)
        parts[part] = Labelled(list(paths), label, tuple(classes), groups, names)
        check_every_class(parts[part], part, file)
    return parts


def read_civilcomments(path: str | os.PathLike) -> dict[str, Labelled]:
    """CivilComments' three parts, as texts.

    A value of 0.5 or more counts as toxic, or as a mention of that identity. `groups` part the
    comments by class × whether any of the eight identities is mentioned; `members` are WILDS's
    sixteen overlapping groups, identity × class, over which its worst-group accuracy is taken.

    path: `all_data_with_identities.csv`, or the folder that holds it.
    """
    file = Path(path)
    if not file.is_file():
        folder = files.folder_at(path, "all_data_with_identities.csv")
        file = files.first_file(folder, ["all_data_with_identities.csv"], "the table of comments")
    texts: dict[str, list[str]] = {part: [] for part in PARTS}
    marks: dict[str, list[list[bool]]] = {part: [] for part in PARTS}
    columns = ["toxicity", *IDENTITIES]
    for line, row in files.rows_of(file, ["comment_text", "split", *columns]):
        where = at_line(file, line)
        if row["split"] not in COMMENT_PARTS:
            raise damaged(where, "split train, val or test", repr(row["split"]))
        if not row["comment_text"].strip():
            raise damaged(where, "a comment_text", "none")
        part = COMMENT_PARTS[row["split"]]
        texts[part].append(row["comment_text"])
        shares = [files.number(row[name], f"{name} in [0, 1]", where) for name in columns]
        marks[part].append([share >= 0.5 for share in shares])
    parts = {}
    names = _group_names(TOXICITY, ("no identity", "identity"))
    for part, rows in marks.items():
        if not rows:
            raise damaged(file, f"comments of {part}", "none")
        table = torch.tensor(rows)
        labels, mentions = table[:, 0].long(), table[:, 1:]
        members = torch.cat([mentions & (labels == label)[:, None] for label in (0, 1)], dim=1)
        groups = 2 * labels + mentions.any(dim=1)
        parts[part] = Labelled(texts[part], labels, TOXICITY, groups, names, members, MEMBERS)
        check_every_class(parts[part], part, file)
    return parts


def _group_names(classes: Sequence[str], attributes: Sequence[str]) -> tuple[str, ...]:
    """In the order of the groups' numbers, 2 · class + attribute."""
    return tuple(f"{label}, {attribute}" for label in classes for attribute in attributes)
