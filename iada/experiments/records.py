"""Records of runs: one JSON file each, read again by the settings that decide the result."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from iada.experiments.scenarios.split import other_parts
from iada.training.config import with_defaults
from iada.utils.checks import argument_error
from iada.utils.files import write_text

Record = dict[str, Any]
RECORD = "record.json"
RENAMED = {"departures": "deviations", "strengths": "epsilon"}  # by earlier versions
SHORT = 60  # letters of a value that a message shows
NAMES = ("experiment", "title", "method", "method_name")  # what a run is called, not what it is


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """All of it or nothing."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_records(folders: Iterable[Path]) -> list[Record]:
    """All records below these folders, each run once; ValueError for a damaged one.

    A file is one record, or a list of them.
    """
    unique: dict[tuple[Any, ...], Record] = {}
    for folder in folders:
        for path in [folder] if folder.is_file() else sorted(folder.rglob(RECORD)):
            content = read_json(path)
            for record in map(renamed, content if isinstance(content, list) else [content]):
                key = (record["experiment"], record["method"], record["seed"])
                unique.setdefault((*key, deviations_of(record)), record)
    return list(unique.values())


def deviations_of(record: Record) -> str:
    """What a run did other than the recipe says."""
    return ", ".join(record.get("deviations") or ())


def previous_record(path: Path, request: Mapping[str, Any]) -> Record:
    """What a previous run wrote to `path`; ValueError if it is not of the same request."""
    record = renamed(read_json(path))
    others = [
        f"another {name}{_differences(record, name, value)}"
        for name, value in request.items()
        if name not in ("title", "method_name") and not _agrees(record, name, value)
    ]
    if others:
        expected, got = "no run, or one with the same settings", f"one with {', '.join(others)}"
        remedy = "choose another --out, or move it"
        raise argument_error(path.parent, expected, got, remedy)
    return record


def equal_run(root: Path, request: Mapping[str, Any]) -> Record | None:
    """The record of a finished run with the same settings on the same data, under this name."""
    for path in sorted(root.rglob(RECORD)):
        try:
            record = renamed(read_json(path))
        except ValueError:
            continue  # whoever asks for that run is told
        if all(_agrees(record, name, request[name]) for name in request if name not in NAMES):
            same_as = record.get("same_as", path.parent.relative_to(root).as_posix())
            return {**record, **request, "same_as": same_as}
    return None


def renamed(record: Record) -> Record:
    """A record with today's names for what earlier versions called otherwise."""
    return {RENAMED.get(name, name): value for name, value in record.items()}


def read_json(path: Path) -> Any:
    """What a file holds; ValueError naming it where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        got, remedy = f"a damaged file ({error})", "delete it: the run goes on or is made again"
        raise argument_error(path, "a run's record", got, remedy) from error


def _differences(record: Mapping[str, Any], name: str, value: Any) -> str:
    """In parentheses what differs, with both values where they are short; "" where none can be."""
    known, parts = record.get(name), []
    if name == "settings" and isinstance(known, dict):
        known = {key: v for key, v in _with_defaults(known).items() if key in value}
    if name == "split" and isinstance(known, dict) and "parts" in known:
        parts = other_parts(known["parts"], value["parts"])
        known, value = ({**split, "parts": None} for split in (known, value))
    then, now = dict(_plain(known)), dict(_plain(value))
    names = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    words = [f"{' '.join(key)} {then.get(key)}, here {now.get(key)}".lstrip() for key in names]
    words += [f"samples of {part}" for part in parts]
    return f" ({'; '.join(words)})" if words else ""


def _plain(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of each short value in a table and in those that it holds."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            yield from _plain(held, (*path, key))
    elif len(str(value)) <= SHORT:
        yield path, value


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """As they would be read again: tuples are lists."""
    return json.loads(json.dumps(with_defaults(settings)))


def _agrees(record: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a record has this value; a setting that its version did not know had its default."""
    known = record.get(name)
    if name == "settings" and isinstance(known, dict):
        known = _with_defaults(known)
        return all(known.get(key) == setting for key, setting in value.items())
    if name == "split" and isinstance(known, dict) and "parts" in known:
        rest = {**known, "parts": None} == {**value, "parts": None}
        return rest and not other_parts(known["parts"], value["parts"])
    return known == value
