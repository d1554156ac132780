"""MNIST in its authors' idx files, packed by gzip or not."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from iada.experiments.datasets.files import bytes_of, damaged, first_file, folder_at
from iada.experiments.datasets.labelled import Labelled, check_every_class

IMAGES, LABELS = 0x0803, 0x0801  # the files' first four bytes: unsigned bytes in 3 axes and in 1
STEMS = {"train": "train", "test": "t10k"}


def read_mnist(path: str | os.PathLike) -> dict[str, Labelled]:
    """MNIST's train and test digits, uint8 (N, 1, 28, 28).

    path: the folder of `train-images-idx3-ubyte` and the like, each with or without `.gz`.
    """
    folder = folder_at(path, "train-images-idx3-ubyte and the other files of MNIST")
    names = tuple(str(digit) for digit in range(10))
    parts = {}
    for part, stem in STEMS.items():
        image_file = _file(folder, f"{stem}-images", 3)
        label_file = _file(folder, f"{stem}-labels", 1)
        images, labels = _array(image_file, IMAGES), _array(label_file, LABELS)
        if len(images) != len(labels):
            got = len(labels)
            raise damaged(label_file, f"{len(images)} labels, as {image_file.name} has images", got)
        wrong = np.flatnonzero(labels > 9)
        if len(wrong):
            raise damaged(f"{label_file}, label {wrong[0]}", "a digit in [0, 10)", labels[wrong[0]])
        tensor = torch.from_numpy(images[:, None].copy())
        parts[part] = Labelled(tensor, torch.from_numpy(labels.astype(np.int64)), names)
        check_every_class(parts[part], part, label_file)
    return parts


def _file(folder: Path, stem: str, axes: int) -> Path:
    spellings = [f"{stem}{dot}idx{axes}-ubyte" for dot in "-."]
    names = [spelling + packed for spelling in spellings for packed in ("", ".gz")]
    return first_file(folder, names, f"MNIST's {stem}")


def _array(path: Path, magic: int) -> np.ndarray:
    """The array of an idx file: magic number, one size for each axis, the bytes."""
    content = bytes_of(path)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(path, "a whole gzip file", error) from error
    start = 4 + 4 * (magic & 0xFF)
    if len(content) < start or int.from_bytes(content[:4]) != magic:
        got = f"{content[:4].hex() or 'no'} in {len(content)} bytes"
        raise damaged(path, f"an idx file that starts {magic:08x}", got)
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    body = np.frombuffer(content, dtype=np.uint8, offset=start)
    if len(body) != int(np.prod(shape)) or not shape[0]:
        raise damaged(path, f"{shape} bytes", len(body))
    return body.reshape(shape)
