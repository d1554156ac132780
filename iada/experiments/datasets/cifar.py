"""CIFAR-10 and CIFAR-100 as their authors publish them: Python pickles, or binary records."""

import codecs
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.files import bytes_of, damaged, folder_at, lines_of, missing
from iada.experiments.datasets.labelled import Labelled, check_every_class

PIXELS = 3 * 32 * 32
# All that a pickled array calls, under the names that numpy gave it before and since version 2.
SAFE: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
for _core in ("core", "_core"):
    SAFE[f"numpy.{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce_ex__(2)[0]
    SAFE[f"numpy.{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]

FILES = {
    10: {
        "folders": ("cifar-10-batches-py", "cifar-10-batches-bin"),
        "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test": ("test_batch",),
        "meta": "batches.meta",
        "names": ("label_names", "batches.meta.txt"),
        "key": "labels",
    },
    100: {
        "folders": ("cifar-100-python", "cifar-100-binary"),
        "train": ("train",),
        "test": ("test",),
        "meta": "meta",
        "names": ("fine_label_names", "fine_label_names.txt"),
        "key": "fine_labels",
    },
}


def read_cifar10(path: str | os.PathLike) -> dict[str, Labelled]:
    """CIFAR-10's train and test images, uint8 (N, 3, 32, 32).

    path: `cifar-10-batches-py` or `cifar-10-batches-bin`, unpacked, or the folder around it.
    """
    return _read(Path(path), 10)


def read_cifar100(path: str | os.PathLike) -> dict[str, Labelled]:
    """CIFAR-100's train and test images with their fine labels, uint8 (N, 3, 32, 32).

    path: `cifar-100-python` or `cifar-100-binary`, unpacked, or the folder around it.
    """
    return _read(Path(path), 100)


def _read(path: Path, classes: int) -> dict[str, Labelled]:
    files: dict[str, Any] = FILES[classes]
    folder, suffix = _find(folder_at(path, f"CIFAR-{classes}"), files)
    names = _class_names(folder, suffix, files, classes)
    parts = {}
    for part in ("train", "test"):
        read = [_records(folder / (name + suffix), files["key"], classes) for name in files[part]]
        counts = {len(labels) for _, labels in read}
        if len(counts) > 1:
            shortest = min(range(len(read)), key=lambda index: len(read[index][1]))
            expected = f"{max(counts)} images, as in the other batches"
            raise damaged(folder / (files[part][shortest] + suffix), expected, min(counts))
        images, labels = (torch.cat(column) for column in zip(*read, strict=True))
        parts[part] = Labelled(images, labels, names)
        check_every_class(parts[part], part, folder)
    return parts


def _find(path: Path, files: dict[str, Any]) -> tuple[Path, str]:
    """The folder that holds the training batches, and the suffix of their names."""
    for folder in (path, *(path / name for name in files["folders"])):
        for suffix in ("", ".bin"):
            if any((folder / (name + suffix)).is_file() for name in files["train"]):
                return folder, suffix
    first, remedy = files["train"][0], f"unpack the archive: it makes {files['folders'][0]}"
    raise missing(path / first, f"{first} (Python version) or {first}.bin (binary)", remedy)


def _class_names(folder: Path, suffix: str, files: dict[str, Any], classes: int) -> tuple[str, ...]:
    key, text_name = files["names"]
    if suffix:
        path = folder / text_name
        names: Any = [line.strip() for line in lines_of(path) if line.strip()]
    else:
        path = folder / files["meta"]
        names = [_text(name) for name in _list(_unpickled(path), key, path)]
    if len(names) != classes:
        raise damaged(path, f"{classes} class names", len(names))
    return tuple(names)


def _records(path: Path, key: str, classes: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels (N) of one file."""
    images: Any
    labels: Any
    if path.suffix == ".bin":
        images, labels = _binary(path, classes)
    else:
        batch = _unpickled(path)
        images, labels = batch.get("data"), _list(batch, key, path)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
            raise damaged(path, "data, a uint8 array (N, 3072)", _kind(images))
    if images.shape[1:] != (PIXELS,) or len(images) != len(labels) or not len(labels):
        got = f"{images.shape} and {len(labels)} labels"
        raise damaged(path, f"{PIXELS} bytes and one label for each image", got)
    for row, label in enumerate(labels):
        if not isinstance(label, int | np.integer) or not 0 <= label < classes:
            raise damaged(f"{path}, image {row}", f"a label in [0, {classes})", label)
    numbers = torch.tensor([int(label) for label in labels], dtype=torch.int64)
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), numbers


def _binary(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte (CIFAR-100: coarse, then fine) and the image."""
    head = 1 if classes == 10 else 2
    content = np.frombuffer(bytes_of(path), dtype=np.uint8)
    if len(content) % (head + PIXELS):
        got = f"{len(content)} bytes, {len(content) % (head + PIXELS)} too many"
        raise damaged(path, f"records of {head + PIXELS} bytes", got)
    records = content.reshape(-1, head + PIXELS)
    return records[:, head:], records[:, head - 1]


class _ArraysOnly(pickle.Unpickler):
    """Loads numbers, strings, lists, dicts and numpy arrays, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return SAFE[module, name]


def _unpickled(path: Path) -> dict[str, Any]:
    content = bytes_of(path)
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise damaged(path, "a pickle of CIFAR", repr(error)) from error
    if not isinstance(batch, dict):
        raise damaged(path, "a pickled dict", _kind(batch))
    return {_text(key): value for key, value in batch.items()}


def _list(batch: dict[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(batch.get(key), list):
        raise damaged(path, f"a list {key}", _kind(batch.get(key)))
    return batch[key]


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "nothing" if value is None else f"a {type(value).__name__}"
