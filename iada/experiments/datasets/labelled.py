"""Samples with their labels: what every reader returns and every scenario cuts up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iada.utils.checks import argument_error, check_label_values, check_labels, check_sizes


@dataclass(frozen=True, eq=False)
class Labelled(Dataset):
    """Samples, their labels and, where the data set has them, their groups; never changed.

    inputs: images in memory, uint8 (N, C, H, W); or N paths of image files; or N texts; or
    features (N, A) of a backbone that is not trained.
    labels: (N) int64 in [0, len(class_names)). groups: (N) int64 in [0, len(group_names)) or None.
    members: (N, M) bool or None, for sets of samples that overlap (CivilComments' identities by
    class), named by `member_names`.
    places: where a person finds each sample, as "train_inputs[3]", (N) where inputs do not say it.
    """

    inputs: Tensor | Sequence[Path] | Sequence[str]
    labels: Tensor
    class_names: tuple[str, ...]
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    members: Tensor | None = None
    member_names: tuple[str, ...] = ()
    places: Sequence[str] = ()

    def __post_init__(self) -> None:
        count = len(self.inputs)
        check_labels(self.labels, count)
        check_label_values(self.labels, len(self.class_names), None)
        if isinstance(self.inputs, Tensor) and (self.inputs.dtype, self.inputs.dim()) not in (
            (torch.uint8, 4),
            (torch.float32, 2),
        ):
            got = f"{self.inputs.dtype} {tuple(self.inputs.shape)}"
            expected = "uint8 images (N, C, H, W), or float32 features (N, A)"
            raise argument_error("inputs", expected, got, "convert them")
        if self.groups is not None:
            check_sizes("groups", self.groups, f"a group ({count},) for each sample", (count,))
            known = (self.groups >= 0) & (self.groups < len(self.group_names))
            if not known.all():
                row = int((~known).nonzero()[0, 0])
                expected = f"groups in [0, {len(self.group_names)})"
                got = f"{int(self.groups[row])} at row {row}"
                raise argument_error("groups", expected, got, "name every group in group_names")
        if self.members is not None:
            expected = f"bool ({count}, {len(self.member_names)})"
            check_sizes("members", self.members, expected, (count, len(self.member_names)))
        if self.places and len(self.places) != count:
            expected = f"a place for each of {count} samples"
            raise argument_error("places", expected, len(self.places), "leave them out")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.inputs[index], int(self.labels[index])

    def place(self, row: int) -> str:
        """Where a person finds the sample: its file, or its row in what was read."""
        if self.places:
            return self.places[row]
        return f"row {row}" if isinstance(self.inputs, Tensor) else str(self.inputs[row])

    @property
    def num_classes(self) -> int:
        """Classes that there are, whether or not each has samples here."""
        return len(self.class_names)

    def class_counts(self) -> Tensor:
        """Samples of each class, (C)."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def group_counts(self) -> Tensor:
        """Samples of each group, (G); ValueError where there are no groups."""
        return torch.bincount(self.grouped(), minlength=len(self.group_names))

    def grouped(self) -> Tensor:
        """The groups, (N); ValueError where there are none."""
        if self.groups is None:
            remedy = "use a data set with groups"
            raise argument_error("groups", "a group for each sample", "None", remedy)
        return self.groups

    def subset(self, rows: Tensor) -> "Labelled":
        """The samples of these row numbers, in their order."""
        rows = rows.long()
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            got = f"{int(rows.min())} to {int(rows.max())}"
            raise argument_error("rows", f"row numbers in [0, {len(self)})", got, "check the split")
        inputs = self.inputs
        if isinstance(inputs, Tensor):
            chosen: Any = inputs[rows]
        else:
            chosen = [inputs[row] for row in rows.tolist()]
        return replace(
            self,
            inputs=chosen,
            labels=self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            members=None if self.members is None else self.members[rows],
            places=[self.places[row] for row in rows.tolist()] if self.places else (),
        )

    def relabelled(self, labels: Tensor) -> "Labelled":
        """The same samples with other labels; their groups stay as they were."""
        return replace(self, labels=labels)


Parts = Mapping[str, Labelled]  # "train", "validation", "test", as far as a data set has them


def check_every_class(part: Labelled, name: str, source: Path) -> None:
    """Each class has a sample in this part."""
    absent = (part.class_counts() == 0).nonzero().flatten().tolist()
    if absent:
        names = ", ".join(part.class_names[c] for c in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        expected = f"samples of each of the {part.num_classes} classes in {name}"
        got = f"none of {names}{more}"
        raise argument_error(source, expected, got, "add them, or take the class away")


def joined(first: Labelled, second: Labelled) -> Labelled:
    """The samples of two subsets of one data set, one after the other."""
    a, b = first.inputs, second.inputs
    inputs: Any = torch.cat([a, b]) if isinstance(a, Tensor) and isinstance(b, Tensor) else [*a, *b]

    def both(name: str) -> Tensor | None:
        parts = getattr(first, name), getattr(second, name)
        return None if parts[0] is None else torch.cat(parts)

    return replace(
        first,
        inputs=inputs,
        labels=torch.cat([first.labels, second.labels]),
        groups=both("groups"),
        members=both("members"),
        places=[*first.places, *second.places],
    )
