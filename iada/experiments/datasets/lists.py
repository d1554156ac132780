"""List files of one's own: lines `path label`, or a CSV with or without a header."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from iada.experiments.datasets.files import at_line, damaged, first_of, lines_of
from iada.experiments.datasets.image_files import SPELLINGS
from iada.utils.checks import argument_error

PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path"),
    *("image_path", "image_file", "image", "img_path", "img"),
)
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "class_name", "category")
PART_COLUMNS = ("split", "subset")
PARTS = {said: part for part, names in SPELLINGS.items() for said in names}
Line = tuple[int, list[str], str]  # its number, its fields, and all of it


class Entry(NamedTuple):
    """What a line says of an image: its path as written there, its label, of which part it is."""

    path: str
    label: str
    part: str = "train"


def entries_of(path: Path, labelled: bool = True) -> list[Entry]:
    """That of each line; a header of a CSV says which of its columns these are.

    labelled: whether each line has a label; else some may, which are left out. A warning names the
    columns that are not read. Raises ValueError naming the line, and FileNotFoundError where the
    first of a CSV is neither header nor image.
    """
    comma = path.suffix.lower() == ".csv"
    rows: list[Line] = []
    for number, text in enumerate(lines_of(path), 1):
        if line := text.strip():
            fields = next(csv.reader([line])) if comma else line.rsplit(maxsplit=1)
            rows.append((number, fields, line))
    header = bool(rows) and not set(_columns(rows[0])).isdisjoint(PATH_COLUMNS)
    if header and _path_of(path, rows[0], labelled) is None:
        if comma:
            return _by_header(path, rows, labelled)
        rows = rows[1:]
    if not rows:
        raise damaged(path, "lines with paths", "none")
    if comma and _path_of(path, rows[0], labelled) is None:
        number, fields, line = rows[0]
        folder, names = path.parent.absolute(), _names(path, fields, line, labelled)
        known = f"a header with one of {', '.join(PATH_COLUMNS)}"
        expected = f"the path of an image, from {folder} on, or {known}"
        got = f"{line!r}, and no file {folder / names[-1]}"
        remedy = _remedy(names, "mend the line, or rename the column")
        error = argument_error(at_line(path, number), expected, got, remedy)
        raise FileNotFoundError(str(error))
    entries = []
    for number, fields, line in rows:
        if labelled and len(fields) < 2:
            got = repr(line)
            raise damaged(at_line(path, number), f"a line `path{',' if comma else ' '}label`", got)
        label = fields[-1].strip(' "') if labelled else ""
        name = _path_of(path, (number, fields, line), labelled)
        entries.append(Entry(name or _names(path, fields, line, labelled)[0], label))
    return entries


def files_of(path: Path, entries: Sequence[Entry]) -> list[Path]:
    """The files that these lines name, from the list's folder on.

    FileNotFoundError naming those that are not there.
    """
    absent = [entry.path for entry in entries if not (path.parent / entry.path).is_file()]
    if absent:
        folder = path.parent.absolute()
        expected = f"images at its paths, which start from {folder}"
        got = f"{len(absent)} of {len(entries)} that are no files"
        remedy = _remedy(absent, "put them there, or mend the lines")
        error = argument_error(path, expected, got, remedy)
        raise FileNotFoundError(f"{error}\n{first_of([str(folder / name) for name in absent])}")
    return [path.parent / entry.path for entry in entries]


def _remedy(names: Sequence[str], otherwise: str) -> str:
    """What to do about paths that lead to nothing from the list's folder."""
    if any(name and Path(name).is_file() for name in names):
        here = f"from the working directory, {Path.cwd()}, there is one"
        return f"{here}: move the list to where its paths start, or write absolute ones"
    return otherwise


def _columns(row: Line) -> list[str]:
    return [field.strip(' "').lower() for field in row[1]]


def _names(path: Path, fields: Sequence[str], line: str, labelled: bool) -> list[str]:
    """What may be the path in a line without a header: without the label, or the line as it is."""
    separator = "," if path.suffix.lower() == ".csv" else " "
    before = separator.join(fields[:-1]).strip(' "')
    return [before] if labelled else [line.strip(' "'), before]


def _path_of(path: Path, row: Line, labelled: bool) -> str | None:
    """The path in a line without a header, if a file is there."""
    _, fields, line = row
    names = _names(path, fields, line, labelled)
    return next((name for name in names if name and (path.parent / name).is_file()), None)


def _by_header(path: Path, rows: Sequence[Line], labelled: bool) -> list[Entry]:
    """The columns by their names; the other one of two is the label's whatever its name."""
    first, names = rows[0][0], _columns(rows[0])

    def column(known: Sequence[str]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    path_at, label_at, part_at = map(column, (PATH_COLUMNS, LABEL_COLUMNS, PART_COLUMNS))
    assert path_at is not None  # what makes it a header
    if label_at is None and len(names) == 2:
        label_at, part_at = 1 - path_at, None
    if labelled and label_at is None:
        expected = f"a column of labels: {', '.join(LABEL_COLUMNS)}"
        raise argument_error(at_line(path, first), expected, ", ".join(names), "rename the column")
    if not rows[1:]:
        raise damaged(path, "lines below the header", "none")
    read = path_at, label_at, part_at
    left = [name or "one without a name" for at, name in enumerate(names) if at not in read]
    if left and labelled:
        warnings.warn(f"{path}: columns {', '.join(left)} left out", stacklevel=5)
    entries = []
    for number, fields, _ in rows[1:]:
        if len(fields) != len(names):
            got = len(fields)
            raise damaged(at_line(path, number), f"{len(names)} fields, as in the header", got)
        label = fields[label_at] if labelled and label_at is not None else ""
        part = "train"
        if labelled and part_at is not None:
            part = _part(fields[part_at], f"{at_line(path, number)}, column {names[part_at]}")
        entries.append(Entry(fields[path_at].strip(' "'), label.strip(' "'), part))
    return entries


def _part(text: str, where: str) -> str:
    """The part of the data that a cell names."""
    said = text.strip(' "').lower()
    if said not in PARTS:
        remedy = "rename it, or take the column away and pass --validation and --test"
        raise argument_error(where, f"one of {', '.join(PARTS)}", repr(text), remedy)
    return PARTS[said]
