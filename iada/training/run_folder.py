"""A run's folder: one process at a time, and a checkpoint that is this run's or refused."""

import contextlib
from pathlib import Path
from typing import Any

from iada.training.checkpoint import load_checkpoint, previous, save_checkpoint
from iada.utils.checks import refusal
from iada.utils.distributed import Group, by_first
from iada.utils.files import check_writable, remove_leftovers
from iada.utils.lock import folder_lock

CHECKPOINT = "checkpoint.pt"


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
            raise refusal("folder", "no checkpoint of another run", str(self.path), remedy)

    def _has_checkpoint(self) -> bool:
        path = self.path / CHECKPOINT
        return path.exists() or previous(path).exists()
