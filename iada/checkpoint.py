"""Checkpoints: written aside and renamed, so that the last good one survives whatever happens."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "iada-checkpoint-2"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path`, all or nothing.

    Raises OSError if the folder cannot be written or is full; a former file at `path` is intact.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _folder_to_disk(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OSError(
            f"checkpoint: expected to write {path}, got {error}; free some space or choose "
            "another folder (a former checkpoint there is intact)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make `folder` and see that a file can be written there; OSError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"iada")
    except OSError as error:
        raise OSError(
            f"folder: expected one that can be written at {folder}, got {error}; choose another"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill in the middle of writing left aside in `folder`."""
    for aside in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            aside.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at `path`, on the CPU, read without running any code from the file.

    Raises FileNotFoundError, and ValueError for a truncated or foreign file.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: expected a file at {path}, got none; check the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint: expected one written by iada at {path}, got a file that cannot be read "
            f"({reason}); it is truncated or foreign, take another"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"checkpoint: expected format {FORMAT!r} at {path}, got {found!r}; "
            "load it with the version of iada, or the program, that wrote it"
        )
    return state


def _folder_to_disk(folder: Path) -> None:
    """Make the new name outlast a loss of power, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
