"""Features of a backbone that is not trained any more: computed once, then read as a data set."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iada.experiments.datasets.files import arrays_of, class_indices, damaged
from iada.experiments.datasets.labelled import Labelled, check_every_class
from iada.utils.checks import argument_error
from iada.utils.files import atomic_write

PARTS = ("train", "validation", "test")
CLASSES, ABOUT = "class_names", "about"


def write_features(
    path: str | os.PathLike, parts: Mapping[str, Labelled], about: Mapping[str, Any]
) -> None:
    """One .npz with {part}_inputs (N, A) float32 and {part}_labels (N) of each part.

    about: plain values, kept beside.
    """
    arrays: dict[str, Any] = {CLASSES: np.array(parts["train"].class_names)}
    arrays[ABOUT] = np.array(json.dumps(about))
    for name, part in parts.items():
        arrays |= {f"{name}_inputs": part.inputs.numpy(), f"{name}_labels": part.labels.numpy()}  # type: ignore[union-attr]
    with atomic_write(Path(path)) as file:
        np.savez(file, **arrays)


def read_features(path: str | os.PathLike) -> dict[str, Labelled]:
    """The parts of a file that `write_features` wrote, or of your own arrays by these names.

    path: an .npz with train_inputs (N, A) of floats, train_labels (N), test_inputs, test_labels,
    and the same for validation if there is one. class_names may be absent.
    """
    file = Path(path)
    arrays = arrays_of(file, "an .npz of features")
    for name in ("train_inputs", "train_labels", "test_inputs", "test_labels"):
        if name not in arrays:
            remedy = "see iada features"
            raise argument_error(file, f"arrays with {name}", ", ".join(arrays) or "none", remedy)
    count = int(arrays["train_labels"].max(initial=-1)) + 1
    names = tuple(map(str, arrays.get(CLASSES, range(count))))
    width = arrays["train_inputs"].shape[-1:]
    parts = {}
    for part in PARTS:
        if f"{part}_inputs" in arrays:
            inputs, labels = arrays[f"{part}_inputs"], arrays.get(f"{part}_labels")
            parts[part] = _part(inputs, labels, width, names, f"{file}, {part}")
            check_every_class(parts[part], part, file)
    return parts


def _part(
    inputs: np.ndarray,
    labels: np.ndarray | None,
    width: tuple[int, ...],
    names: tuple[str, ...],
    where: str,
) -> Labelled:
    """Features and labels of one part, each checked."""
    if inputs.dtype.kind != "f" or inputs.ndim != 2 or inputs.shape[1:] != width:
        got = f"{inputs.dtype} {inputs.shape}"
        raise damaged(f"{where}_inputs", f"floats (N, {width[0]})", got)
    if not np.isfinite(inputs).all():
        row = int(np.argmin(np.isfinite(inputs).all(axis=1)))
        raise damaged(f"{where}_inputs", "finite numbers", f"others in row {row}")
    expected = f"{len(inputs)} whole numbers in [0, {len(names)})"
    indices = class_indices(labels, expected, where, len(inputs))
    if indices.min() < 0 or indices.max() >= len(names):
        raise damaged(f"{where}_labels", expected, f"{indices.min()} to {indices.max()}")
    return Labelled(torch.from_numpy(inputs).float(), indices, names)
