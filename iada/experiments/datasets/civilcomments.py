"""CivilComments as WILDS publishes it (Borkan et al., 2019; Koh et al., 2021)."""

import os
from pathlib import Path

import torch

from iada.experiments.datasets.files import (
    DAMAGED,
    at_line,
    first_file,
    folder_at,
    number,
    rows_of,
)
from iada.experiments.datasets.labelled import Labelled, check_every_class
from iada.utils.checks import refusal

CLASSES = ("non-toxic", "toxic")
IDENTITIES = (
    "male",
    "female",
    "LGBTQ",
    "christian",
    "muslim",
    "other_religions",
    "black",
    "white",
)
GROUPS = tuple(f"{label}, {kind}" for label in CLASSES for kind in ("no identity", "identity"))
MEMBERS = tuple(f"{label}, {identity}" for label in CLASSES for identity in IDENTITIES)
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def read_civilcomments(path: str | os.PathLike) -> dict[str, Labelled]:
    """CivilComments' three parts, as texts.

    A value of 0.5 or more counts as toxic, or as a mention of that identity. `groups` part the
    comments by class × whether any of the eight identities is mentioned; `members` are WILDS's
    sixteen overlapping groups, identity × class, over which its worst-group accuracy is taken.

    path: `all_data_with_identities.csv`, or the folder that holds it.
    """
    file = Path(path)
    if not file.is_file():
        folder = folder_at(path, "all_data_with_identities.csv")
        file = first_file(folder, ["all_data_with_identities.csv"], "the table of comments")
    texts: dict[str, list[str]] = {part: [] for part in SPLITS.values()}
    marks: dict[str, list[list[bool]]] = {part: [] for part in SPLITS.values()}
    for line, row in rows_of(file, ["comment_text", "split", "toxicity", *IDENTITIES]):
        where = at_line(file, line)
        if row["split"] not in SPLITS:
            raise refusal(where, "split train, val or test", repr(row["split"]), DAMAGED)
        if not row["comment_text"].strip():
            raise refusal(where, "a comment_text", "none", DAMAGED)
        part = SPLITS[row["split"]]
        texts[part].append(row["comment_text"])
        marks[part].append(
            [
                number(row[name], f"{name} in [0, 1]", where) >= 0.5
                for name in ("toxicity", *IDENTITIES)
            ]
        )
    parts = {}
    for part, rows in marks.items():
        if not rows:
            raise refusal(str(file), f"comments of {part}", "none", DAMAGED)
        table = torch.tensor(rows)
        labels, mentions = table[:, 0].long(), table[:, 1:]
        members = torch.cat([mentions & (labels == label)[:, None] for label in (0, 1)], dim=1)
        groups = 2 * labels + mentions.any(dim=1)
        parts[part] = Labelled(texts[part], labels, CLASSES, groups, GROUPS, members, MEMBERS)
        check_every_class(parts[part], part, file)
    return parts
