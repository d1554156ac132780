"""Files written aside and renamed, so that the last good one survives whatever happens."""

import contextlib
import csv
import io
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from iada.utils.checks import argument_error


@contextlib.contextmanager
def atomic_write(path: Path, former: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends well; else a former file there is intact.

    That one stays as `former`, if asked for and where the file system has hard links.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            yield file
            fsync(file)
        if former is not None:
            with contextlib.suppress(OSError):  # also where there is none yet
                os.link(path, former)
        os.replace(aside, path)
        _fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file, all of it or nothing."""
    with atomic_write(path) as file:
        file.write(text.encode())


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as comma-separated lines."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def remove_leftovers(path: Path) -> None:
    """Delete what a kill in the middle of writing `path` left aside."""
    for aside in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            aside.unlink()


def check_writable(folder: Path) -> None:
    """Make `folder` and see that a file can be written there; OSError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"iada")
    except OSError as error:
        raise OSError(
            f"folder: expected one that can be written at {folder}, got {error}; choose another"
        ) from error


def load_plain(
    path: Path, expected: str, remedy: str, form: str | None = None, name: str | None = None
) -> Any:
    """What torch.save wrote, on the CPU, read without running code.

    Raises ValueError for a file that cannot be read or has a changed bit and, with `form`, for
    what is no dict with this under "format". name: of the file in messages, its path by default.
    """
    name = name or str(path)
    try:
        if zipfile.is_zipfile(path):  # torch.save writes checksums, torch.load reads none
            with zipfile.ZipFile(path) as file:
                if (changed := file.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{changed} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        got = f"a file that cannot be read ({reason})"
        raise argument_error(name, expected, got, remedy) from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if form is not None and found != form:
        raise argument_error(name, f"{expected} of format {form!r}", repr(found), remedy)
    return content


def fsync(file: IO) -> None:
    """Wait until what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    """Make a new name outlast a loss of power, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
