"""Settings in frozen dataclasses: each field has the type of its default, within stated bounds."""

import dataclasses
import math
import operator
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iada.utils.checks import argument_error, check_choice

BOUNDS: dict[str, tuple[str, Callable[[Any, float], bool]]] = {
    "least": ("at least", operator.ge),
    "most": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def setting(
    default: Any, *, choices: Sequence[str] | None = None, checked: bool = True, **bounds: float
) -> Any:
    """A field with BOUNDS, or choices, that `check_settings` looks at if it is `checked`.

    Of a tuple each item is one of the choices, where there are any.
    """
    metadata = {"choices": choices, "checked": checked, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(record: Any) -> None:
    """Each field has the type of its default, and keeps its bounds; numbers are finite.

    An int stands for a float, and a list for a tuple, of integers or of choices. None stands for a
    default that is filled in later, of the field's own type. Raises ValueError naming the field.
    """
    for field in dataclasses.fields(record):
        if not field.metadata.get("checked", True):
            continue
        value, default = getattr(record, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is None:
            if value is None:
                continue
            default = 0 if field.type is int else ()
        remedy = f"see {type(record).__name__}.{field.name}"
        choices = field.metadata.get("choices")
        if isinstance(default, tuple):
            kind, words = (str, "names") if choices else (int, "integers")
            if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
                raise argument_error(field.name, f"a list of {words}", repr(value), remedy)
            object.__setattr__(record, field.name, tuple(value))
        elif isinstance(default, float) and type(value) in (int, float):
            if not math.isfinite(value):
                raise argument_error(field.name, "a finite number", repr(value), remedy)
            object.__setattr__(record, field.name, float(value))
        elif type(value) is not type(default):
            wanted = f"a value of type {type(default).__name__}"
            raise argument_error(field.name, wanted, repr(value), remedy)
        if choices:
            for item in value if isinstance(default, tuple) else (value,):
                check_choice(field.name, item, choices)
        for kind, bound in field.metadata.get("bounds", {}).items():
            words, keeps = BOUNDS[kind]
            if not keeps(value, bound):
                remedy = f"{default} is usual"
                raise argument_error(field.name, f"{words} {bound}", repr(value), remedy)


def from_table(kind: type) -> Callable[[Mapping[str, Any]], Any]:
    """From a table of settings to the dataclass; ValueError for a key that it does not have."""

    def build(values: Mapping[str, Any]) -> Any:
        known = [field.name for field in dataclasses.fields(kind)]
        for key in values:
            check_choice(key, key, known, "rename or remove it")
        return kind(**values)

    return build


def read_toml(
    path: Path,
    sections: Mapping[str, Callable[[Mapping[str, Any]], Any]],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a TOML file's tables become: of each section, by the function that it is given to.

    changes: {section: {key: value}} over the file's own.

    Raises ValueError naming the file, the section and the key, and OSError if it cannot be read.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise argument_error(path, "a TOML file", got, "check the path")
    with open(path, "rb") as file:
        try:
            tables = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected TOML, got {error}; mend that line") from error
    for section, values in (changes or {}).items():
        tables[section] = {**tables.get(section, {}), **values}
    for section in tables:
        if section not in sections:
            known = ", ".join(f"[{name}]" for name in sections)
            remedy = "rename or remove it"
            raise argument_error(f"{path} [{section}]", known, "another section", remedy)
    built = {}
    for section, build in sections.items():
        values = tables.get(section, {})
        if not isinstance(values, dict):
            remedy = f"write [{section}]"
            raise argument_error(f"{path} [{section}]", "a table", repr(values), remedy)
        try:
            built[section] = build(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} [{section}] {error}") from error
    return built
