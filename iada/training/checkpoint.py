"""Checkpoints: all or nothing, and read without running code."""

import copy
from pathlib import Path
from typing import Any

import torch

from iada.utils.files import atomic_write

FORMAT = "iada-checkpoint-2"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path`, all or nothing.

    Raises OSError if the folder cannot be written or is full; a former file at `path` is intact.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OSError(
            f"checkpoint: expected to write {path}, got {error}; free some space or choose "
            "another folder (a former checkpoint there is intact)"
        ) from error


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
