"""Data of your own: class folders, a list file, an .npz, or a Hugging Face data set on disk.

What the data set has no part for is cut off its training samples, class by class.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.files import (
    arrays_of,
    check_image_file,
    class_indices,
    first_of,
    missing,
    required,
)
from iada.experiments.datasets.image_files import (
    SPELLINGS,
    files_with,
    images_below,
    part_folders,
    read_folder,
)
from iada.experiments.datasets.images import open_image, small_images
from iada.experiments.datasets.labelled import Labelled
from iada.experiments.datasets.lists import entries_of, files_of
from iada.experiments.datasets.overlap import check_apart
from iada.utils.checks import argument_error

KINDS = "a folder of class folders, a list of lines `path label`, an .npz, or a saved data set"
TEXT = "US"  # numpy's kinds of text
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")


def read_own(
    path: str | os.PathLike,
    validation: float | str = 0.2,
    test: float | str = 0.0,
    meta: str = "",
    memory: bool | None = None,
    check: bool = True,
) -> dict[str, Labelled]:
    """Training samples with what is held out, from any of KINDS; every image is looked at.

    path: class folders (`<class>/` or `train/<class>/`, beside it `val` and `test` if there are),
    a text or CSV file with a line `path label` or `path,label` for each image, an .npz with
    (train_)inputs and (train_)labels, or what `datasets.Dataset.save_to_disk` wrote.
    validation, test: a share of each class's training samples to hold out, 0 for none, or a path
    of the same kinds. Parts that the data set has itself are taken as they are, unless a path is
    given. meta: a path to a clean meta set, "" for none.
    memory: keep decoded images in memory; None where all are of one size up to 64×64.
    check: whether to look at every image first, and for samples that are in two parts.

    Raises ValueError, or OSError for a file, for fewer than two classes, an unknown class, parts
    that share samples, or files that are no images, which are named.
    """
    parts = _read(Path(path))
    if "train" not in parts:
        expected = "a part 'train'"
        raise argument_error(path, expected, ", ".join(parts), "name it so, or pass its path")
    train = parts["train"]
    if train.num_classes < 2:
        remedy = "add samples of another class, a folder for each"
        raise argument_error(path, "at least 2 classes", f"1 ({train.class_names[0]})", remedy)
    sources = dict.fromkeys(("train", "validation", "test", "meta"), path)
    for name, source in (("validation", validation), ("test", test), ("meta", meta)):
        if source and isinstance(source, str):
            given, sources[name] = _read(Path(source)), source
            parts[name] = next(given[part] for part in (name, "train", "test") if part in given)
    parts = {name: _with_classes(part, train, name) for name, part in parts.items()}
    held_out = []
    for name, share in (("test", test), ("validation", validation)):
        if isinstance(share, float | int) and share and name not in parts:
            parts |= _held_out(parts["train"], name, share)
            held_out.append(name)
    if check:
        check_apart({**parts, "train": train}, sources, held_out)
    return _decoded(parts, memory, check)


def folders_read(path: Path) -> list[Path]:
    """The folders at a path of which all that is in them is read."""
    return [] if not path.is_dir() or _is_saved(path) else list(part_folders(path).values())


def read_unlabelled(path: Path) -> Labelled:
    """Images to be classified: all of a folder and those below it, one image, or a list file."""
    if path.is_dir():
        files, skipped = images_below(path, "or pass their folder")
        if skipped:
            warnings.warn(f"{path}: skipped {files_with(skipped)}", stacklevel=2)
    elif path.suffix.lower() in (".txt", ".csv"):
        files = files_of(path, entries_of(path, labelled=False))
    else:
        check_image_file(path, str(path))
        files = [path]
    return Labelled(files, torch.zeros(len(files), dtype=torch.int64), ("",))


@dataclass(frozen=True)
class StoredImage:
    """An encoded image in a Hugging Face data set: what `open_image` needs of a path."""

    rows: Any
    column: str
    row: int
    name: str

    def read_bytes(self) -> bytes:
        """The encoded image."""
        cell = self.rows[self.row][self.column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def __str__(self) -> str:
        return self.name


def _read(path: Path) -> dict[str, Labelled]:
    """The parts at a path, images as paths."""
    if path.is_dir():
        return _hugging_face(path) if _is_saved(path) else read_folder(path, False, check=False)
    if not path.is_file():
        raise missing(path, KINDS, "pass where the data lies")
    readers: dict[str, Callable[[Path], dict[str, Labelled]]] = {".npz": _arrays}
    return readers.get(path.suffix.lower(), _list)(path)


def _is_saved(folder: Path) -> bool:
    """Whether it is a Hugging Face data set."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def _list(path: Path) -> dict[str, Labelled]:
    """The images that a list file names, from its folder on; labels are names or numbers."""
    entries = entries_of(path)
    files = files_of(path, entries)
    parts = {}
    for part in dict.fromkeys(entry.part for entry in entries):
        rows = [row for row, entry in enumerate(entries) if entry.part == part]
        names = _in_order({entries[row].label for row in rows})
        place = {name: row for row, name in enumerate(names)}
        labels = torch.tensor([place[entries[row].label] for row in rows])
        parts[part] = Labelled([files[row] for row in rows], labels, names)
    return parts


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names by the alphabet, numbers by their size."""
    return tuple(sorted(labels, key=lambda name: (len(name) * name.isdigit(), name)))


def read_arrays(path: Path) -> Labelled:
    """The inputs of an .npz, with labels 0 where it has none; of several the first, and told."""
    parts = _arrays(path, labelled=False)
    first, *others = parts
    if others:
        left = ", ".join(others)
        warnings.warn(f"{path}: inputs of {first} taken, of {left} left out", stacklevel=2)
    return parts[first]


def _arrays(path: Path, labelled: bool = True) -> dict[str, Labelled]:
    """Images (N, H, W), (N, H, W, 3) or (N, 3, H, W) uint8, or features (N, A), and labels (N),
    which are class indices or names."""
    arrays = arrays_of(path, "an .npz of arrays")
    arrays |= {f"train_{name}": arrays[name] for name in ("inputs", "labels") if name in arrays}
    if not labelled:
        arrays.setdefault("train_labels", np.zeros(len(arrays.get("train_inputs", ())), np.int64))
    if not {"train_inputs", "train_labels"} <= set(arrays):
        got = ", ".join(arrays) or "none"
        raise argument_error(path, "arrays inputs and labels", got, "name them so")
    names = _class_names(arrays)
    if labelled and "class_names" not in arrays:
        _tell_empty_classes(path, arrays["train_labels"], len(names))
    parts = {}
    given = [name.removesuffix("_inputs") for name in arrays if name.endswith("_inputs")]
    for part, said in _spelled(given, path).items():
        inputs, labels = arrays[f"{said}_inputs"], arrays.get(f"{said}_labels")
        if labels is None and not labelled:
            labels = np.zeros(len(inputs), np.int64)
        read = _array_part(inputs, labels, names, f"{path} {said}")
        array = "inputs" if part == "train" and "inputs" in arrays else f"{said}_inputs"
        parts[part] = replace(read, places=[f"{array}[{row}]" for row in range(len(read))])
    return parts


def _class_names(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    labels = arrays["train_labels"]
    if "class_names" in arrays:
        return tuple(map(str, arrays["class_names"].ravel()))
    if labels.dtype.kind in TEXT:
        return _in_order(set(labels.astype(str).ravel().tolist()))
    count = int(labels.max(initial=0)) + 1 if labels.dtype.kind in "iu" else 0
    return tuple(map(str, range(count)))


def _tell_empty_classes(path: Path, labels: np.ndarray, count: int) -> None:
    """Warn of classes without samples: labels may count from 1, or leave numbers out."""
    empty = sorted(set(range(count)) - set(np.unique(labels).tolist()))
    if empty and labels.dtype.kind in "iu":
        start = f"do labels start at {labels.min()}?" if empty[0] == 0 else "are numbers left out?"
        named = ", ".join(map(str, empty[:5])) + ", …" * (len(empty) > 5)
        text = f"{path}: {len(empty)} of {count} classes without training samples ({named})"
        warnings.warn(f"{text}; {start}", stacklevel=4)


def _array_part(
    inputs: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...], where: str
) -> Labelled:
    if labels is not None and labels.dtype.kind in TEXT:
        labels = _indices(labels.astype(str), names, where)
    indices = class_indices(labels, f"{len(inputs)} whole numbers or names", where, len(inputs))
    accepted = False
    tensor = torch.from_numpy(inputs) if inputs.dtype.kind in "fu" else torch.empty(0)
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        images = tensor[:, None] if inputs.ndim == 3 else tensor
        images = images if images.shape[1] in (1, 3) else images.permute(0, 3, 1, 2)
        if images.shape[1] in (1, 3):
            tensor, accepted = images.expand(-1, 3, -1, -1).contiguous(), True
    elif inputs.dtype.kind == "f" and inputs.ndim == 2:
        if len(places := np.argwhere(~np.isfinite(inputs))):
            got = f"{inputs[tuple(places[0])]} at {places[0].tolist()}, and {len(places)} in all"
            raise argument_error(f"{where}_inputs", "finite features", got, "mend or drop them")
        tensor, accepted = tensor.float(), True
    if not accepted:
        got = f"{inputs.dtype} {inputs.shape}"
        expected = "uint8 images (N, H, W), (N, H, W, 3), (N, 3, H, W), or features (N, A)"
        raise argument_error(f"{where}_inputs", expected, got, "convert them")
    return Labelled(tensor, indices, names)


def _indices(labels: np.ndarray, names: tuple[str, ...], where: str) -> np.ndarray:
    """Each label's place among the class names."""
    place = {name: row for row, name in enumerate(names)}
    unknown = sorted(set(labels.ravel().tolist()) - set(names))
    if unknown:
        expected = f"one of the classes {', '.join(names)}"
        raise argument_error(f"{where}_labels", expected, repr(unknown[0]), "rename it, or add it")
    indices = [place[label] for label in labels.ravel().tolist()]
    return np.array(indices, np.int64).reshape(labels.shape)


def _hugging_face(path: Path) -> dict[str, Labelled]:
    """What `save_to_disk` wrote: an image or a text column, and one of class labels."""
    datasets = required("datasets", f"{path} is a Hugging Face data set; pip install datasets")
    loaded = datasets.load_from_disk(str(path))
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {
        part: _columns(datasets, splits[name], path, name)
        for part, name in _spelled(splits, path).items()
    }


def _spelled(names: Iterable[str], path: Path) -> dict[str, str]:
    """The parts that these names are, as in {"validation": "valid"}; a warning names the others."""
    given = set(names)
    parts = {
        part: name for part, said in SPELLINGS.items() for name in reversed(said) if name in given
    }
    unread = sorted(given - set(parts.values()))
    if unread:
        text = f"{path}: {', '.join(unread)} left out; parts are {', '.join(SPELLINGS)}"
        warnings.warn(text, stacklevel=4)
    return parts


def _columns(datasets: Any, rows: Any, path: Path, part: str) -> Labelled:
    features, where = rows.features, f"{path} {part}"
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    inputs = next(iter(images), _first(TEXT_COLUMNS, features))
    label = _first(LABEL_COLUMNS, features)
    if inputs is None or label is None:
        expected = f"a column of images or of {TEXT_COLUMNS[0]}, and a column {LABEL_COLUMNS[0]!r}"
        raise argument_error(where, expected, ", ".join(features), "rename the columns")
    known, kind = list(rows[label]), features[label]
    if isinstance(kind, datasets.ClassLabel):
        names = kind.names
    else:
        names = sorted(set(known))
        place = {name: row for row, name in enumerate(names)}
        known = [place[value] for value in known]
    if images:
        encoded = rows.cast_column(inputs, datasets.Image(decode=False))
        listed: Any = [
            StoredImage(encoded, inputs, row, f"{where} row {row}") for row in range(len(rows))
        ]
    else:
        listed = list(rows[inputs])
    places = [f"{part}[{row}]" for row in range(len(rows))]
    return Labelled(listed, torch.tensor(known), tuple(map(str, names)), places=places)


def _first(names: Sequence[str], known: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in known), None)


def _with_classes(part: Labelled, train: Labelled, name: str) -> Labelled:
    """The part with the training samples' classes, by their names."""
    if part.class_names == train.class_names:
        return part
    other = [one for one in part.class_names if one not in train.class_names]
    if other:
        expected = f"the classes of the training samples ({', '.join(train.class_names)})"
        raise argument_error(name, expected, f"{other[0]!r} too", "rename it, or take it away")
    place = torch.tensor([train.class_names.index(one) for one in part.class_names])
    return replace(part, labels=place[part.labels], class_names=train.class_names)


def _held_out(train: Labelled, name: str, share: float) -> dict[str, Labelled]:
    """A share of each class, at least one sample of it and never the last one."""
    if not 0 < share < 1:
        remedy = "0.2 is usual"
        raise argument_error(f"--{name}", "a share in (0, 1), or a path", repr(share), remedy)
    rng = np.random.default_rng(0)
    taken = torch.zeros(len(train), dtype=torch.bool)
    for c in range(train.num_classes):
        own = (train.labels == c).nonzero().flatten().numpy()
        count = min(len(own) - 1, max(1, round(share * len(own))))
        taken[rng.permutation(own)[: max(count, 0)]] = True
    if not taken.any():
        expected = "a class with two samples or more, to hold one out"
        raise argument_error(f"--{name}", expected, "one of each", "pass a path, or add samples")
    rows = torch.arange(len(train))
    return {"train": train.subset(rows[~taken]), name: train.subset(rows[taken])}


def _decoded(parts: dict[str, Labelled], memory: bool | None, check: bool) -> dict[str, Labelled]:
    """The parts, small images of one size in memory; every image file is read once before."""
    files = {
        name: part.inputs
        for name, part in parts.items()
        if not isinstance(part.inputs, Tensor) and not isinstance(part.inputs[0], str)
    }
    if not files:
        return parts
    if check:
        check_images([file for part in files.values() for file in part])  # type: ignore[misc]
    decoded: dict[str, Tensor] = {}
    for name, listed in files.items() if memory is not False else ():
        images = small_images(listed, photo=True)  # type: ignore[arg-type]
        if images is None or any(images.shape[1:] != one.shape[1:] for one in decoded.values()):
            if memory:
                remedy = "pass memory=None to read them as needed"
                raise argument_error("memory", "images of one small size", "others", remedy)
            return parts
        decoded[name] = images
    return {
        name: replace(part, inputs=decoded[name], places=part.places or [*map(str, part.inputs)])
        if name in decoded
        else part
        for name, part in parts.items()
    }


def check_images(files: Sequence[Path]) -> None:
    """OSError that counts and names the files that are no whole images; each is decoded once."""

    def fault(file: Path) -> str | None:
        try:
            open_image(file, photo=True)
        except OSError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        faults = [text for text in pool.map(fault, files) if text is not None]
    if faults:
        counted = [f"{len(faults)} of {len(files)} images cannot be read"] * (len(faults) > 1)
        raise OSError("\n".join([*counted, first_of(faults)]))
