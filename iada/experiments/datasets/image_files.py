"""Image files: a folder for each class, or lists with a line `path label` for each image.

{train, validation, test}/<class>/<image>, or <class>/<image> alone; and the lists of ImageNet-LT,
Places-LT and iNaturalist 2018.
"""

import os
import warnings
from collections import Counter
from pathlib import Path

import torch

from iada.experiments.datasets.files import (
    at_line,
    check_image_file,
    damaged,
    folder_at,
    integer,
    lines_of,
    missing,
)
from iada.experiments.datasets.images import SUFFIXES, small_images
from iada.experiments.datasets.labelled import Labelled, check_every_class
from iada.utils.checks import argument_error

PARTS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
SPELLINGS = {**PARTS, "meta": ("meta",)}  # of parts in data of one's own


def read_folder(
    path: str | os.PathLike, memory: bool | None = None, check: bool = True
) -> dict[str, Labelled]:
    """The images of each class's folder and of those below it; classes in alphabetical order.

    path: a folder with `train` and, if there are any, `val` or `validation` and `test`; or one
    with a folder for each class, which is then all of `train`.
    memory: keep the decoded images in memory, as one uint8 tensor; None does so where all are of
    the same size, up to 64×64 pixels. True fails where that is not so.
    check: whether to look for empty files.

    A warning says how many files are skipped, as they are no images by their suffixes.
    """
    folder = folder_at(path, "train/<class>/ or <class>/ with images")
    folders = part_folders(folder)
    names = _classes(folders["train"])
    skipped: Counter[str] = Counter()
    listed = {part: _images(own, names, skipped) for part, own in folders.items()}
    if check:
        for image in (image for images, _ in listed.values() for image in images):
            check_image_file(image, str(image.parent))
    if skipped:
        warnings.warn(f"{folder}: skipped {files_with(skipped)}", stacklevel=3)
    for own in folders.values():
        if loose := sum(Path(entry.name).suffix.lower() in SUFFIXES for entry in _visible(own)):
            warnings.warn(f"{own}: skipped images in no class's folder: {loose}", stacklevel=3)
    if all(image.parent.parent != folders["train"] for image in listed["train"][0]):
        text = f"all images lie below the folders of {', '.join(names[:3])}, taken as the classes"
        warnings.warn(f"{folders['train']}: {text}", stacklevel=3)
    loaded = [] if memory is False else _decoded([paths for paths, _ in listed.values()])
    if memory and not loaded:
        remedy = "pass memory=None to read them as needed"
        raise argument_error("memory", "images of one size, up to 64×64 pixels", "others", remedy)
    parts = {}
    for index, (part, (paths, labels)) in enumerate(listed.items()):
        parts[part] = Labelled(loaded[index] if loaded else paths, torch.tensor(labels), names)
    return parts


def part_folders(folder: Path) -> dict[str, Path]:
    """The folder of each part; without any, `folder` itself is that of the training images."""
    spelled = [(part, folder / name) for part, names in PARTS.items() for name in names]
    folders = {part: there for part, there in spelled if there.is_dir()}
    if folders and "train" not in folders:
        raise missing(folder / "train", "the training images", f"look into {folder}")
    return folders or {"train": folder}


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in _visible(folder) if entry.is_dir()))
    if not names:
        raise missing(folder / "<class>", "a folder for each class", f"look into {folder}")
    return names


def _images(
    folder: Path, names: tuple[str, ...], skipped: Counter[str]
) -> tuple[list[Path], list[int]]:
    """Paths and labels of all images in the classes' folders; `skipped` takes in other files."""
    other = sorted(set(_classes(folder)) - set(names))
    if other:
        expected = "the classes of the training images"
        raise argument_error(folder / other[0], expected, "another", "rename the folder")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        class_folder = folder / name
        if not class_folder.is_dir():
            raise missing(class_folder, f"the images of class {name!r}", "add them")
        images, others = images_below(class_folder, "or take the class away")
        skipped += others
        paths += images
        labels += [label] * len(images)
    return paths, labels


def images_below(path: Path, remedy: str) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and in those below it, links followed, and other files by suffix.

    ValueError without images; remedy: beside adding some.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    seen = set()
    for root, folders, files in os.walk(path, followlinks=True):
        place = os.path.realpath(root)
        folders[:] = [name for name in folders if name[0] != "." and place not in seen]
        visible = [Path(root, name) for name in files if name[0] != "." and place not in seen]
        seen.add(place)  # a link may lead back
        for file in visible:
            if file.suffix.lower() in SUFFIXES:
                images.append(file)
            else:
                others[file.suffix.lower() or "no suffix"] += 1
    if not images:
        got = "none" + (f", but {files_with(others)}" if others else "")
        raise argument_error(path, "images", got, f"add some ({', '.join(SUFFIXES)}), {remedy}")
    return sorted(images), others


def files_with(suffixes: Counter[str]) -> str:
    """As in "9 files: .heic"."""
    count = suffixes.total()
    return f"{count} file{'s' if count > 1 else ''}: {', '.join(sorted(suffixes))}"


def _decoded(listed: list[list[Path]]) -> list[torch.Tensor]:
    """The images of every part in memory; empty unless all are small and of one size."""
    images: list[torch.Tensor] = []
    for paths in listed:
        part = small_images(paths)
        if part is None or part.shape[1:] != (images or [part])[0].shape[1:]:
            return []
        images.append(part)
    return images


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


ENDINGS = {"train": "_train.txt", "validation": "_val.txt", "test": "_test.txt"}


def read_lists(
    path: str | os.PathLike, images: str | os.PathLike | None = None, num_classes: int | None = None
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
        raise argument_error(folder, f"one *{ending}", got, "keep one data set's lists in a folder")
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
            raise damaged(where, expected, repr(line))
        name, label = fields[0].strip(), fields[1]
        if name in seen:
            got = f"{name} of line {seen[name]} again"
            raise argument_error(where, "each image once", got, "take one of the lines away")
        seen[name] = number
        labels.append(integer(label, allowed, expected, where))
        paths.append(root / name)
        check_image_file(paths[-1], where)
    return paths, labels
