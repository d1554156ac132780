"""What every reader asks of files: that they are there, whole, and in the form that is expected.

Each fault is told by file and line, before anything is handed out. A file that is not there is a
FileNotFoundError, one that is damaged a ValueError; both carry the message of `argument_error`.
"""

import contextlib
import csv
import io
import os
from collections.abc import Container, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iada.utils.checks import argument_error

DAMAGED = "mend the file, or fetch it again"
NAMED_AT_MOST = 10  # faults in one message


def required(name: str, hint: str) -> Any:
    """The module of an optional package; ImportError with the hint where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(hint) from error


def missing(path: Path, expected: str, remedy: str) -> FileNotFoundError:
    """The error for a path that should hold `expected` and does not."""
    got = "nothing" if not path.exists() else "something else"
    return FileNotFoundError(str(argument_error(path, expected, got, remedy)))


def damaged(where: object, expected: str, got: object) -> ValueError:
    """The error for a file, or a place in it, that holds something else than `expected`."""
    return argument_error(where, expected, got, DAMAGED)


def first_of(faults: Sequence[str]) -> str:
    """The first few, a line each, and how many more there are."""
    left = len(faults) - NAMED_AT_MOST
    return "\n".join([*faults[:NAMED_AT_MOST], *[f"and {left} more"] * (left > 0)])


def at_line(path: Path, line: int) -> str:
    """How a line of a file is named in messages."""
    return f"{path}, line {line}"


def folder_at(path: str | os.PathLike, expected: str) -> Path:
    """`path` as the folder that it must be."""
    folder = Path(path)
    if not folder.is_dir():
        raise missing(folder, f"a folder with {expected}", "pass the folder that holds the data")
    return folder


def first_file(folder: Path, names: Sequence[str], expected: str) -> Path:
    """The first of `names` that is a file in `folder`."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    choices = " or ".join(names)
    raise missing(folder / names[0], f"{expected} ({choices})", f"look into {folder}")


def bytes_of(path: Path) -> bytes:
    """A file's bytes; an empty file is refused."""
    if not path.is_file():
        raise missing(path, "a file", "fetch it, or pass the folder that holds it")
    content = path.read_bytes()
    if not content:
        raise damaged(path, "a file with content", "an empty one")
    return content


def arrays_of(path: Path, expected: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name, read without running code."""
    content = bytes_of(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own
        remedy = "save text as labels.astype(str)" if "pickle" in str(error) else DAMAGED
        raise argument_error(path, expected, repr(error), remedy) from error


def class_indices(labels: np.ndarray | None, expected: str, where: str, count: int) -> torch.Tensor:
    """`{where}_labels` as (count) int64, if they are whole numbers."""
    if labels is None or labels.shape != (count,) or labels.dtype.kind not in "iu":
        got = "none" if labels is None else f"{labels.dtype} {labels.shape}"
        raise damaged(f"{where}_labels", expected, got)
    return torch.from_numpy(labels.astype(np.int64))


def lines_of(path: Path) -> list[str]:
    """A UTF-8 text file's lines; an empty file is refused."""
    content = bytes_of(path)
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise damaged(at_line(path, line), "UTF-8 text", "other bytes") from error


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of each row of a CSV file that has at least `columns`."""
    bytes_of(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            absent = [name for name in columns if name not in header]
            if absent:
                got = f"none of {', '.join(absent)}"
                raise damaged(at_line(path, 1), f"a header with {', '.join(columns)}", got)
            count = 0
            for row in reader:
                where = at_line(path, reader.line_num)
                if len(row) != len(header):
                    raise damaged(where, f"{len(header)} fields", len(row))
                count += 1
                yield reader.line_num, dict(zip(header, row, strict=True))
            if not count:
                raise damaged(path, "rows below the header", "none")
        except (csv.Error, UnicodeDecodeError) as error:
            expected = "comma-separated UTF-8 text"
            raise damaged(at_line(path, reader.line_num + 1), expected, error) from error


def integer(text: str, allowed: Container[int], expected: str, where: str) -> int:
    """`text` as one of the allowed whole numbers."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) in allowed:
            return value
    raise damaged(where, expected, repr(text))


def number(text: str, expected: str, where: str) -> float:
    """`text` as a number in [0, 1]."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise damaged(where, expected, repr(text))


def check_image_file(path: Path, where: str) -> None:
    """An image file is there and not empty; what is in it shows when it is read."""
    try:
        size = path.stat().st_size
    except OSError:
        remedy = "put the image there, or pass the folder of the images"
        text = str(argument_error(where, f"an image at {path}", "no such file", remedy))
        raise FileNotFoundError(text) from None
    if not size:
        remedy = "fetch that image again"
        raise argument_error(where, f"an image at {path}", "an empty file", remedy)
