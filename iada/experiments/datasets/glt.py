"""Generalized long-tail benchmarks (Tang et al., 2022): ImageNet-GLT and MSCOCO-GLT."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from iada.experiments.datasets.files import bytes_of, check_image_file, damaged, folder_at, missing
from iada.experiments.datasets.labelled import Labelled, check_every_class
from iada.utils.checks import argument_error, check_choice

# Which test set goes with which protocol. ALT is the training set with balanced classes: it lies in
# an annotation file of its own (…_inter_bl.json, coco_cbl) and has the same test set as GLT.
TESTS = {"clt": "test_bl", "glt": "test_bbl", "alt": "test_bbl"}


def read_glt(
    path: str | os.PathLike, images: str | os.PathLike | None = None, protocol: str = "glt"
) -> dict[str, Labelled]:
    """The train, validation and test images of an annotation file, by path.

    Groups are class-wise attributes (ImageNet-GLT: clusters from frequent to rare), the same
    numbers in every class. path: the annotation json. images: the folder that the images lie in;
    the paths in the file, written on its authors' machine, are looked up there by their endings;
    None takes them as they are. protocol: "clt", "glt" or "alt", which chooses the test set.
    """
    check_choice("protocol", protocol, [*TESTS])
    file = Path(path)
    annotation = _json(file)
    names = _class_names(annotation, file)
    root = None if images is None else folder_at(images, "the images")
    sections = {"train": "train", "validation": "val", "test": TESTS[protocol]}
    by_part = {p: _entries(annotation, name, len(names), file) for p, name in sections.items()}
    most = max(attribute for entries in by_part.values() for _, _, attribute in entries)
    groups = tuple(f"attribute {number}" for number in range(most + 1))  # the same for all parts
    drop = _leading(Path(by_part["train"][0][0]), root, f"{file}, train")
    parts = {}
    for part, entries in by_part.items():
        written, labels, attributes = zip(*entries, strict=True)
        paths = [Path(entry) for entry in written]
        if root is not None:
            paths = [root.joinpath(*path.parts[drop:]) for path in paths]
        for image in paths:
            check_image_file(image, f"{file}, {sections[part]}")
        parts[part] = Labelled(paths, torch.tensor(labels), names, torch.tensor(attributes), groups)
    check_every_class(parts["train"], "train", file)
    if protocol == "alt":
        counts = parts["train"].class_counts()
        if counts.max() > 2 * counts.min():
            expected = "training classes of one size, as the ALT protocol has them"
            got = f"{int(counts.min())} to {int(counts.max())} images"
            raise argument_error(file, expected, got, "pass the file of ALT's own training set")
    return parts


def _json(file: Path) -> dict[str, Any]:
    content = bytes_of(file)
    try:
        annotation = json.loads(content)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise damaged(f"{file}, line {line}", "json", error) from error
    if not isinstance(annotation, dict):
        raise damaged(file, "a json object", f"a {type(annotation).__name__}")
    return annotation


def _class_names(annotation: dict[str, Any], file: Path) -> tuple[str, ...]:
    """The names of classes 0, 1, … out of id2cat."""
    class_names = annotation.get("id2cat")
    if not isinstance(class_names, dict) or not class_names:
        raise damaged(f"{file}, id2cat", "a name for each class", repr(class_names))
    numbers = [str(number) for number in range(len(class_names))]
    absent = [number for number in numbers if number not in class_names]
    if absent:
        got = f"none of {absent[0]}"
        raise damaged(f"{file}, id2cat", f"names of classes 0 to {len(class_names) - 1}", got)
    return tuple(str(class_names[number]) for number in numbers)


def _entries(
    annotation: dict[str, Any], section: str, classes: int, file: Path
) -> list[tuple[str, int, int]]:
    """(path, label, attribute) of each image of a section."""
    where = f"{file}, {section}"
    columns = annotation.get(section)
    if not isinstance(columns, dict) or not isinstance(columns.get("label"), dict):
        raise damaged(where, "a section with label", "none")
    if not columns["label"]:
        remedy = "this file holds another protocol: take its other"
        raise argument_error(where, "images", "none", remedy)
    entries = []
    for key, label in columns["label"].items():
        entry = f"{where}, {key}"
        attribute = _value(columns, "attribute", key, entry)
        # MSCOCO-GLT has ids instead of paths.
        path = _value(columns, "path", key, entry) if "path" in columns else key
        number = _whole(label, f"a label in [0, {classes})", entry)
        if number >= classes:
            raise damaged(entry, f"a label in [0, {classes})", label)
        entries.append((str(path), number, _whole(attribute, "an attribute from 0 on", entry)))
    return entries


def _value(section: dict[str, Any], table: str, key: str, where: str) -> Any:
    values = section.get(table)
    if not isinstance(values, dict) or key not in values:
        raise damaged(where, f"its {table}", "none")
    return values[key]


def _whole(value: Any, expected: str, where: str) -> int:
    """A whole number from 0 on; the authors' files have some of them as strings."""
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).isdecimal():
        return int(value)
    raise damaged(where, expected, repr(value))


def _leading(path: Path, root: Path | None, where: str) -> int:
    """How many leading parts of the file's paths to drop, so that the rest lies below `root`."""
    if root is None:
        return 0
    for drop in range(len(path.parts)):
        if path.parts[drop] != path.anchor and root.joinpath(*path.parts[drop:]).is_file():
            return drop
    raise missing(root / path.name, f"the images of {where}, such as {path}", "pass their folder")
