"""Settings in frozen dataclasses: each field has the type of its default, within stated bounds."""

import dataclasses
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iada.utils.checks import check_choice, refusal


def setting(
    default: Any,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    checked: bool = True,
) -> Any:
    """A field with bounds, or choices, that `check_settings` looks at if it is `checked`."""
    bounds: dict[str, Any] = {
        "choices": choices,
        "least": least,
        "most": most,
        "above": above,
        "below": below,
    }
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=metadata | {"checked": checked})


def check_settings(record: Any) -> None:
    """Each field has the type of its default, and keeps its bounds; numbers are finite.

    An int stands for a float, and a list for a tuple of the default's kind. None stands for a
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
        if isinstance(default, tuple):
            if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
                raise refusal(field.name, "a list of integers", repr(value), remedy)
            object.__setattr__(record, field.name, tuple(value))
        elif isinstance(default, float) and type(value) in (int, float):
            if not math.isfinite(value):
                raise refusal(field.name, "a finite number", repr(value), remedy)
            object.__setattr__(record, field.name, float(value))
        elif type(value) is not type(default):
            wanted = f"a value of type {type(default).__name__}"
            raise refusal(field.name, wanted, repr(value), remedy)
        _check_bounds(field.name, value, field.metadata, default)


def _check_bounds(name: str, value: Any, bounds: Any, default: Any) -> None:
    if "choices" in bounds:
        check_choice(name, value, bounds["choices"])
    for word, bound, kept in (
        ("at least", bounds.get("least"), lambda limit: value >= limit),
        ("at most", bounds.get("most"), lambda limit: value <= limit),
        ("above", bounds.get("above"), lambda limit: value > limit),
        ("below", bounds.get("below"), lambda limit: value < limit),
    ):
        if bound is not None and not kept(bound):
            raise refusal(name, f"{word} {bound}", repr(value), f"{default} is usual")


def from_table(kind: type) -> Callable[[Mapping[str, Any]], Any]:
    """From a table of settings to the dataclass; ValueError for a key that it does not have."""

    def build(values: Mapping[str, Any]) -> Any:
        known = [field.name for field in dataclasses.fields(kind)]
        for key in values:
            if key not in known:
                expected, remedy = f"one of {', '.join(known)}", "rename or remove it"
                raise refusal(key, expected, "an unknown key", remedy)
        return kind(**values)

    return build


def read_toml(
    path: Path, sections: Mapping[str, Callable[[Mapping[str, Any]], Any]]
) -> dict[str, Any]:
    """What a TOML file's tables become: of each section, by the function that it is given to.

    Raises ValueError naming the file, the section and the key, and OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            tables = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected TOML, got {error}; mend that line") from error
    for section in tables:
        if section not in sections:
            known = ", ".join(f"[{name}]" for name in sections)
            raise refusal(f"{path} [{section}]", known, "another section", "rename or remove it")
    built = {}
    for section, build in sections.items():
        values = tables.get(section, {})
        if not isinstance(values, dict):
            raise refusal(f"{path} [{section}]", "a table", repr(values), f"write [{section}]")
        try:
            built[section] = build(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} [{section}] {error}") from error
    return built
