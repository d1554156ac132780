"""Waterbirds (Sagawa et al., 2020): birds on land and on water backgrounds."""

import os
from pathlib import Path

import torch

from iada.experiments.datasets import files
from iada.experiments.datasets.labelled import Labelled, check_every_class
from iada.utils.checks import refusal

CLASSES = ("landbird", "waterbird")
PLACES = ("land", "water")
SPLITS = ("train", "validation", "test")
GROUPS = tuple(f"{bird}, {place}" for bird in CLASSES for place in PLACES)


def read_waterbirds(path: str | os.PathLike) -> dict[str, Labelled]:
    """Waterbirds' three parts, by path; groups are bird × background, (class · 2 + place).

    path: the folder of `metadata.csv` (columns img_filename, y, split, place) and of the images.
    """
    folder = files.folder_at(path, "metadata.csv and the images")
    file = files.first_file(folder, ["metadata.csv"], "the table of images")
    rows: list[tuple[Path, int, int, int]] = []
    for line, row in files.rows_of(file, ["img_filename", "y", "split", "place"]):
        where = files.at_line(file, line)
        bird = files.integer(row["y"], range(2), "y, 0 (landbird) or 1 (waterbird)", where)
        place = files.integer(row["place"], range(2), "place, 0 (land) or 1 (water)", where)
        split = files.integer(row["split"], range(3), "split, 0, 1 or 2", where)
        files.check_image_file(folder / row["img_filename"], where)
        rows.append((folder / row["img_filename"], bird, place, split))
    return grouped_parts(rows, CLASSES, GROUPS, file)


def grouped_parts(
    rows: list[tuple[Path, int, int, int]],
    classes: tuple[str, ...],
    groups: tuple[str, ...],
    file: Path,
) -> dict[str, Labelled]:
    """The parts of (path, label, attribute, split) rows; groups are class × two attributes."""
    parts = {}
    for number, part in enumerate(SPLITS):
        in_part = [row for row in rows if row[3] == number]
        if not in_part:
            raise refusal(str(file), f"rows of {part} (split {number})", "none", files.DAMAGED)
        labels = torch.tensor([label for _, label, _, _ in in_part])
        attributes = torch.tensor([attribute for _, _, attribute, _ in in_part])
        paths = [path for path, *_ in in_part]
        parts[part] = Labelled(paths, labels, classes, 2 * labels + attributes, groups)
        check_every_class(parts[part], part, file)
    return parts
