"""Samples of one's own data that are in two parts, or in one under several labels."""

import hashlib
import os
import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from iada.experiments.datasets.labelled import Labelled
from iada.utils.checks import argument_error

# What must not be in which: figures on it would be of samples that were learned from.
APART = (("test", "train"), ("validation", "train"), ("meta", "test"), ("meta", "validation"))
NAMED_AT_MOST = 3
Sources = Mapping[str, str | os.PathLike]  # of parts, by their names
Shared = list[tuple[int, int]]  # row in a part, row in another


def check_apart(
    parts: Mapping[str, Labelled], sources: Sources, held_out: Collection[str] = ()
) -> None:
    """ValueError for parts that share files or rows, or most images of the smaller by content.

    parts: "train" as it was read, before others were held out of it; held_out: these. Warns of
    what may be meant: a meta set that repeats training samples, samples of one content, which
    honest data has too, and most of all as features and as texts, and files that are listed twice.
    ValueError, too, for a file with several labels.
    """
    keys = {name: _identities(part, sources[name]) for name, part in parts.items()}
    for name in parts:
        if name not in held_out:
            _check_one_label(parts[name], keys[name], sources[name])
    for name, other in (*APART, ("meta", "train")):
        if name not in parts or other not in parts or name in held_out:
            continue
        part, there = parts[name], parts[other]
        shared = _shared(keys[name], keys[other])
        wrong, words = bool(shared), f"that are there ({_named(shared, part)})"
        if not shared:
            shared = _shared(*_contents(part, there))
            wrong = _are_images(part) and 2 * len(shared) > min(len(part), len(there))
            words = f"with the content of some there ({_named(shared, part, there)})"
        if not shared:
            continue
        where, expected = f"{name} ({sources[name]})", f"samples apart from those of {other}"
        got = f"{len(shared)} of {len(part)} {words}"
        if wrong and (name, other) in APART:
            remedy = "take them out of one of the two, or have a share held out"
            if other in held_out:
                remedy = f"take them out of the training samples, or pass --{other} PATH"
            raise argument_error(where, expected, got, remedy)
        warnings.warn(f"{where}: expected {expected}, got {got}", stacklevel=3)


def _identities(part: Labelled, source: str | os.PathLike) -> list[str]:
    """What each sample is known by: its file, or its row in the source."""
    if part.places:
        return [f"{Path(source).resolve()} {place}" for place in part.places]
    return [str(Path(file).resolve()) for file in part.inputs]


def _check_one_label(part: Labelled, keys: Sequence[str], source: str | os.PathLike) -> None:
    """Files that are listed again have the label that they had; a warning says how many there are.

    One label each is what a classifier learns: another is a mistake, or data with several at once.
    """
    labels: dict[str, set[int]] = {}
    for key, label in zip(keys, part.labels.tolist(), strict=True):
        labels.setdefault(key, set()).add(label)
    several = {key: known for key, known in labels.items() if len(known) > 1}
    if several:
        named = "; ".join(
            f"{key}: {', '.join(part.class_names[label] for label in sorted(known))}"
            for key, known in list(several.items())[:NAMED_AT_MOST]
        )
        got = f"{len(several)} with several ({named}{_more(len(several))})"
        raise argument_error(source, "one label for each image", got, "take the wrong ones away")
    if len(labels) < len(keys):
        again = f"{len(keys) - len(labels)} of {len(keys)} images are listed again"
        text = "what is held out may have been trained on"
        warnings.warn(f"{source}: {again}; {text}", stacklevel=4)


def _shared(keys: Sequence[Hashable], others: Sequence[Hashable]) -> Shared:
    """(row, row in the other) of each key that is known there; None is no key."""
    place = {key: row for row, key in enumerate(others) if key is not None}
    return [(row, place[key]) for row, key in enumerate(keys) if key in place]


def _contents(part: Labelled, other: Labelled) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
    """What tells the content of each sample of both, as far as they are of one kind."""
    both: Any = part.inputs, other.inputs
    kinds = {Tensor if isinstance(inputs, Tensor) else type(inputs[0]) for inputs in both}
    if kinds == {str}:
        return both
    if kinds == {Tensor}:
        rows, others = ([_hash(row.numpy().tobytes()) for row in inputs] for inputs in both)
        return rows, others
    if kinds & {str, Tensor}:
        return (), ()
    sizes = [[_size(file) for file in files] for files in both]
    common = set(sizes[0]) & set(sizes[1]) - {None}  # the others need not be read
    first, second = (
        [
            _hash(file.read_bytes()) if size in common else None
            for file, size in zip(files, own, strict=True)
        ]
        for files, own in zip(both, sizes, strict=True)
    )
    return first, second


def _size(file: Any) -> int | None:
    """Bytes of an image file, or of one that is stored; None where there is none to be read."""
    try:
        return os.stat(file).st_size if isinstance(file, Path) else len(file.read_bytes())
    except OSError:
        return None


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _are_images(part: Labelled) -> bool:
    if isinstance(part.inputs, Tensor):
        return not part.inputs.is_floating_point()
    return not isinstance(part.inputs[0], str)


def _named(shared: Shared, part: Labelled, other: Labelled | None = None) -> str:
    """The first of them; with `other`, each with what has the same content there."""
    first = shared[:NAMED_AT_MOST]
    named = [
        part.place(row) + (f" is {other.place(there)}" if other is not None else "")
        for row, there in first
    ]
    return ", ".join(named) + _more(len(shared))


def _more(count: int) -> str:
    return ", …" if count > NAMED_AT_MOST else ""
