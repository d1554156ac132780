"""The first phase of a run, trained once for all runs of a folder that begin alike."""

from pathlib import Path
from typing import Any

from iada.experiments.recipe import Recipe
from iada.experiments.scenarios import Split
from iada.experiments.scenarios.split import fingerprint, other_parts, outline
from iada.training.checkpoint import CHECKPOINT, remove_checkpoint
from iada.training.first_phase import (
    digest,
    first_phase_state,
    load_first_phase,
    save_first_phase,
    start_from,
)
from iada.training.trainer import Trainer
from iada.utils.checks import argument_error
from iada.utils.distributed import by_first
from iada.utils.files import check_writable
from iada.utils.lock import folder_lock

FOLDER, FILE = "first-phase", "first-phase.pt"


def first_phase_digest(recipe: Recipe, trainer: Trainer, split: Split) -> str:
    """Of all that decides what the epochs of CE leave: training images and labels, model, settings.

    Not of the test set, so that protocols which share a training set share this too.
    """
    data = {
        "reader": recipe.data["reader"],
        "train": outline(split.train),
        "model": recipe.model.as_record(),
    }
    return digest(trainer.config, data)


def take_up_first_phase(trainer: Trainer, phase: Trainer, split: Split) -> None:
    """Start `trainer` from what `phase` leaves, training that to its end where it is not done.

    phase: a trainer with `first_phase_config`, and a folder of its own. A file there that stops
    before the last epoch, as one that another machine has left, is gone on from.
    """
    folder = phase.folder
    assert folder is not None
    path = folder / FILE

    def previous() -> dict[str, Any] | None:
        check_writable(folder)
        return load_first_phase(path) if path.exists() else None

    state = by_first(previous, trainer.group)
    trained_on, tested = {"train": fingerprint(split.train)}, fingerprint(split.test)
    if state is not None and other_parts(state.get("trained_on", trained_on), trained_on):
        expected, remedy = "a first phase on these training samples", "move it away"
        raise argument_error(path, expected, "one on others that look alike", remedy)
    if state is None or state["epoch"] < phase.config.epochs:
        state = _finished(phase, path, state, {"trained_on": trained_on, "tested": tested})
    if other_parts({"test": state["tested"]}, {"test": tested}):
        rows = state["history"]
        state["history"] = [{name: row[name] for name in ("epoch", "loss")} for row in rows]
    start_from(trainer, state)


def _finished(
    phase: Trainer, path: Path, state: dict[str, Any] | None, data: dict[str, Any]
) -> dict[str, Any]:
    """What `phase` leaves, kept in the file; data: fingerprints that are kept with it."""
    if not phase.resume() and state is not None:
        start_from(phase, state)
    phase.fit()
    state = {**first_phase_state(phase), **data}

    def keep() -> None:
        with folder_lock(path.parent):
            save_first_phase(path, state)
            remove_checkpoint(path.parent / CHECKPOINT)  # the file has all of it

    by_first(keep, phase.group)
    return state
