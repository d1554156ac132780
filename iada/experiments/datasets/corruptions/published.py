"""CIFAR-10-C and CIFAR-100-C as published: NAME.npy for each corruption, and labels.npy."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.corruptions.made import SEVERITIES
from iada.experiments.datasets.files import damaged, folder_at, missing
from iada.experiments.datasets.labelled import Labelled
from iada.utils.checks import argument_error

LABELS = "labels.npy"
# Beside the fifteen of the benchmark its authors give four to choose settings by: not in its mean.
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")


@dataclass(frozen=True)
class PublishedCorruptions:
    """The files of a folder: uint8 (5 N, H, W, C), all images at severity 1, then 2, to 5.

    Classes are numbered as CIFAR's own files number them, which is in the order of their names;
    `test` must have the same order. The images are those of the whole test set of CIFAR, whatever
    part of it `test` is.
    """

    folder: Path
    test: Labelled

    @property
    def about(self) -> dict[str, Any]:
        """Where they are from, for a record."""
        size = sum(path.stat().st_size for path in self.files.values())
        about = {"source": "published", "folder": self.folder.name, "bytes": size}
        return {**about, "files": sorted(self.files)}

    @cached_property
    def files(self) -> dict[str, Path]:
        """By corruption. Raises FileNotFoundError where there is none."""
        folder = folder_at(self.folder, f"the files of CIFAR-10-C and {LABELS}")
        paths = {p.stem: p for p in sorted(folder.glob("*.npy")) if p.name != LABELS}
        if not paths or not (folder / LABELS).is_file():
            path = folder / (LABELS if paths else "gaussian_noise.npy")
            raise missing(path, "a file of CIFAR-10-C", "fetch and unpack it")
        return paths

    @cached_property
    def labels(self) -> Tensor:
        """Of all files, (5 N) int64."""
        path = self.folder / LABELS
        labels = _array(path)
        classes = self.test.num_classes
        whole = labels.ndim == 1 and len(labels) % SEVERITIES == 0 and labels.dtype.kind in "iu"
        if not whole or not len(labels) or labels.min() < 0 or labels.max() >= classes:
            expected = f"labels below {classes}, as many for each of {SEVERITIES} severities"
            raise damaged(path, expected, f"{labels.dtype} {labels.shape}, or others")
        return torch.from_numpy(labels.astype(np.int64))

    def __iter__(self) -> Iterator[tuple[str, Labelled]]:
        """(name, data), each name's severities in order."""
        images = self.test.inputs
        assert isinstance(images, Tensor)
        channels, height, width = images.shape[1:]
        shape = (len(self.labels), height, width, channels)
        for name, path in self.files.items():
            array = _array(path)
            if array.dtype != np.uint8 or array.shape != shape:
                got = f"{array.dtype} {array.shape}"
                remedy = "pass the folder of the data set that the run is of"
                raise argument_error(path, f"uint8 {shape}", got, remedy)
            count = len(array) // SEVERITIES
            for first in range(0, len(array), count):
                part = np.ascontiguousarray(array[first : first + count].transpose(0, 3, 1, 2))
                labels = self.labels[first : first + count]
                yield name, Labelled(torch.from_numpy(part), labels, self.test.class_names)


def _array(path: Path) -> np.ndarray:
    """Of an .npy file, read without running code, and from the disk as it is needed."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, "an array that numpy has written", error) from error
