"""Checkpoints: all or nothing, read without running code; and the folder of a run, which has one.

One process at a time is in a run's folder, and a checkpoint there is this run's or refused.
"""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch

from iada.utils.checks import argument_error
from iada.utils.distributed import Group, by_first
from iada.utils.files import atomic_write, check_writable, load_plain, remove_leftovers
from iada.utils.lock import folder_lock

FORMAT = "iada-checkpoint-2"
CHECKPOINT = "checkpoint.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path`, all or nothing.

    The former file at `path` stays as `previous(path)`, where the file system has hard links.
    Raises OSError if the folder cannot be written or is full; a former file at `path` is intact.
    """
    try:
        previous(path).unlink(missing_ok=True)  # never three at a time on the disk
        with atomic_write(path, previous(path)) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OSError(
            f"checkpoint: expected to write {path}, got {error}; free some space or choose "
            "another folder (a former checkpoint there is intact)"
        ) from error


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_stem(f"{path.stem}.previous")


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint at `path` and the one before it."""
    for file in (previous(path), path):
        file.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at `path`, on the CPU, read without running any code from the file.

    Raises FileNotFoundError, and ValueError for a damaged or foreign file.
    """
    former = previous(path)
    if not path.exists():
        got, remedy = "none", "check the path"
        if former.exists():
            got, remedy = f"only {former.name}", "rename that, or delete it to begin anew"
        raise FileNotFoundError(f"checkpoint: expected a file at {path}, got {got}; {remedy}")
    remedy = "take another, or the version of iada that wrote it"
    if former.exists():
        remedy = f"put {former.name}, the one before it, in its place"
    expected, remedy = f"one written by iada at {path}", f"it is damaged or foreign, {remedy}"
    return load_plain(path, expected, remedy, FORMAT, "checkpoint")


def load_parts(parts: dict[str, Any], state: dict[str, Any]) -> None:
    """`load_state_dict` of each part from its entry in `state`: all of them, or none.

    Raises ValueError, with every part as it was, if one does not fit.
    """
    former = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, KeyError, ValueError) as error:
        for name, part in parts.items():
            part.load_state_dict(former[name])
        raise ValueError(
            f"checkpoint: expected the model and data of this run, got another's ({error}); "
            "build the same backbone, head and data set, or choose another folder"
        ) from error


class RunFolder:
    """Where checkpoint.pt is kept; the first process reads and writes for all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_our_checkpoint = False

    def enter(self, entered: contextlib.ExitStack, group: Group) -> None:
        """Find out now whether a checkpoint can be written; `entered` keeps the folder's lock.

        Raises OSError, and ValueError for a folder of another run, or in use.
        """
        by_first(lambda: self._enter(entered), group)

    def save(self, state: dict[str, Any], group: Group) -> None:
        """Write checkpoint.pt, all or nothing."""
        by_first(lambda: save_checkpoint(self.path / CHECKPOINT, state), group)
        self.has_our_checkpoint = True

    def load(self, group: Group) -> dict[str, Any] | None:
        """The state in checkpoint.pt; None if the folder has none."""
        path = self.path / CHECKPOINT
        begun = by_first(self._has_checkpoint, group)
        return by_first(lambda: load_checkpoint(path) if begun else None, group)

    def _enter(self, entered: contextlib.ExitStack) -> None:
        check_writable(self.path)
        entered.enter_context(folder_lock(self.path))
        remove_leftovers(self.path / CHECKPOINT)
        if self._has_checkpoint() and not self.has_our_checkpoint:
            remedy = "call resume() first, or move it"
            raise argument_error("folder", "no checkpoint of another run", self.path, remedy)

    def _has_checkpoint(self) -> bool:
        path = self.path / CHECKPOINT
        return path.exists() or previous(path).exists()
