"""What a scenario returns: the parts of one experiment, kept as row numbers beside the run."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.files import arrays_of, bytes_of, damaged
from iada.experiments.datasets.labelled import Labelled, Parts, joined
from iada.utils.checks import argument_error
from iada.utils.files import atomic_write, write_text

PIECES = ("train", "meta", "validation", "test")
ROWS, RECORD = "split.npz", "split.json"
MOST_FILES = 100_000  # of a part, whose sizes are looked at


def requested(scenario: str, seed: int, **parameters: Any) -> dict[str, Any]:
    """What a scenario was asked for, as a split's record begins."""
    return {"scenario": scenario, "parameters": parameters, "seed": seed}


@dataclass(frozen=True, eq=False)
class Split:
    """The data of one experiment, a function of a data set, parameters and a seed.

    wrong: (N_train) bool, the training labels that noise made wrong; None where there is no noise.
    rows: row numbers (N) of each piece within the part of the data set it comes from.
    record: plain values: what was request, which part each piece comes from, samples of each class.
    """

    train: Labelled
    meta: Labelled | None
    validation: Labelled | None
    test: Labelled
    wrong: Tensor | None
    rows: dict[str, Tensor]
    record: dict[str, Any]

    @classmethod
    def of(
        cls,
        parts: Parts,
        pieces: Mapping[str, tuple[str, Tensor] | None],
        request: Mapping[str, Any],
        train_labels: Tensor | None = None,
    ) -> Self:
        """The split whose pieces are these rows of these parts; None for a piece without any.

        train_labels: the training labels with noise; the others are the data set's own.
        """
        chosen = {name: piece for name, piece in pieces.items() if piece is not None}
        shared = request["parameters"].get("meta_in_train", False)
        _check_apart({n: piece for n, piece in chosen.items() if n != "meta" or not shared})
        record = {
            **request,
            "from": {name: part for name, (part, _) in chosen.items()},
            "parts": {name: fingerprint(part) for name, part in parts.items()},
        }
        rows = {name: rows for name, (_, rows) in chosen.items()}
        return cls._built(parts, rows, record, train_labels)

    @classmethod
    def _built(
        cls,
        parts: Parts,
        rows: dict[str, Tensor],
        record: dict[str, Any],
        train_labels: Tensor | None,
    ) -> Self:
        pieces = {name: parts[record["from"][name]].subset(piece) for name, piece in rows.items()}
        wrong = None
        if train_labels is not None:
            wrong = train_labels != pieces["train"].labels
            pieces["train"] = pieces["train"].relabelled(train_labels)
        counts = {name: piece.class_counts().tolist() for name, piece in pieces.items()}
        chosen = (pieces["train"], pieces.get("meta"), pieces.get("validation"), pieces["test"])
        return cls(*chosen, wrong, rows, {**record, "class_counts": counts})

    def with_meta_in_train(self) -> "Split":
        """The same with the meta set's samples as training samples, and without a meta set.

        What a method that needs no meta set may fairly have. ValueError where there is none, or
        where it comes from another part of the data set than the training samples.
        """
        source = self.record["from"]
        inside = self.record["parameters"].get("meta_in_train", False)
        if self.meta is None or source["meta"] != source["train"] or inside:
            got = "none" if self.meta is None else f"one from {source['meta']!r}"
            got = "one that is among them already" if inside else got
            expected = "a meta set from the part of the training samples, and apart from these"
            raise argument_error("with_meta", expected, got, "leave with_meta out")
        rows = {name: piece for name, piece in self.rows.items() if name != "meta"}
        rows["train"] = torch.cat([self.rows["train"], self.rows["meta"]])
        train = joined(self.train, self.meta)
        counts = {n: c for n, c in self.record["class_counts"].items() if n != "meta"}
        record = {
            **self.record,
            "from": {name: part for name, part in source.items() if name != "meta"},
            "meta_in_train": len(self.meta),
            "class_counts": {**counts, "train": train.class_counts().tolist()},
        }
        wrong = None
        if self.wrong is not None:
            wrong = torch.cat([self.wrong, self.wrong.new_zeros(len(self.meta))])
        return replace(self, train=train, meta=None, wrong=wrong, rows=rows, record=record)

    def with_meta_limit(self, each: int) -> "Split":
        """The same with at most `each` meta samples of each class; all others are left unused."""
        if self.meta is None:
            raise argument_error("meta_per_class", "a meta set", "none", "leave meta_per_class out")
        by_class = [
            (self.meta.labels == c).nonzero()[:each, 0] for c in range(self.meta.num_classes)
        ]
        chosen = torch.cat(by_class).sort().values
        meta = self.meta.subset(chosen)
        rows = {**self.rows, "meta": self.rows["meta"][chosen]}
        counts = {**self.record["class_counts"], "meta": meta.class_counts().tolist()}
        return replace(self, meta=meta, rows=rows, record={**self.record, "class_counts": counts})

    def save(self, folder: str | os.PathLike) -> None:
        """Write `split.npz` (rows, noisy labels) and `split.json` (the record) into `folder`."""
        arrays: dict[str, Any] = {name: rows.numpy() for name, rows in self.rows.items()}
        if self.wrong is not None:
            arrays["train_labels"] = self.train.labels.numpy()
        with atomic_write(Path(folder) / ROWS) as file:
            np.savez_compressed(file, **arrays)
        write_text(Path(folder) / RECORD, json.dumps(self.record, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | os.PathLike, parts: Parts) -> Self:
        """The split that `save` wrote, of the same data set; ValueError for another one."""
        record_file = Path(folder) / RECORD
        try:
            record = json.loads(bytes_of(record_file))
            recorded = record["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(record_file, "a split's record", repr(error)) from error
        current = {name: fingerprint(part) for name, part in parts.items()}
        if other := other_parts(recorded, current):
            remedy = "pass the data that the split was made of, or make it anew"
            expected = "the data set that the split was made of"
            got = f"another {', '.join(other)}"
            raise argument_error(record_file, expected, got, remedy)
        loaded = arrays_of(Path(folder) / ROWS, "a split's rows")
        arrays = {name: torch.from_numpy(rows.astype(np.int64)) for name, rows in loaded.items()}
        labels = arrays.pop("train_labels", None)
        if set(arrays) != set(record["from"]):
            got = ", ".join(sorted(arrays)) or "none"
            raise damaged(Path(folder) / ROWS, "the record's pieces", got)
        return cls._built(parts, arrays, record, labels)


def fingerprint(part: Labelled) -> dict[str, Any]:
    """`outline`, and a hash of all that is in memory; of files, of their folders and sizes.

    Of more than MOST_FILES files every so manieth is looked at.
    """
    state = hashlib.blake2b(digest_size=16)
    if isinstance(part.inputs, Tensor):
        for rows in part.inputs.split(10_000):
            state.update(rows.contiguous().cpu().numpy().tobytes())
    else:
        for item in part.inputs[:: max(1, len(part) // MOST_FILES)]:
            if isinstance(item, str):
                state.update(item.encode() + b"\0")
            else:
                size = item.stat().st_size if item.exists() else -1
                state.update(f"{item.parent.name}/{item.name}\0{size}\0".encode())
    return {**outline(part), "content": state.hexdigest()}


def other_parts(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The names of the parts that are another, by fingerprints.

    Earlier versions recorded outlines alone: what a record has not is not compared.
    """
    names = sorted({*recorded, *current})
    return [name for name in names if not _same(recorded.get(name), current.get(name))]


def _same(known: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    if known is None or now is None:
        return False
    return all(now.get(name) == value for name, value in known.items())


def outline(part: Labelled) -> dict[str, Any]:
    """How many samples, and a hash of their labels and of a part of what they are.

    First phases are known by it: it stays as it is.
    """
    state = hashlib.blake2b(part.labels.numpy().tobytes(), digest_size=16)
    if isinstance(part.inputs, Tensor):
        step = max(1, len(part) // 1000)
        state.update(part.inputs[::step].contiguous().numpy().tobytes())
    else:
        for item in part.inputs:
            state.update((item if isinstance(item, str) else item.name).encode() + b"\0")
    return {"count": len(part), "hash": state.hexdigest()}


def _check_apart(pieces: Mapping[str, tuple[str, Tensor]]) -> None:
    """No sample is in two pieces, nor twice in one; a fault here is one of the scenario."""
    seen: dict[str, Tensor] = {}
    for part, rows in pieces.values():
        seen[part] = torch.cat([seen.get(part, rows.new_empty(0)), rows])
    for part, rows in seen.items():
        if len(rows.unique()) != len(rows):
            remedy = "mend the scenario"
            raise argument_error(part, "each sample in one piece", "some in two", remedy)
