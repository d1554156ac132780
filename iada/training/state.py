"""The state of a run, from which it goes on: everything that decides what comes after."""

from typing import TYPE_CHECKING, Any

from iada.training.checkpoint import load_parts
from iada.training.config import check_same_run
from iada.training.run_data import check_same_labels, digest_of
from iada.utils import seeds
from iada.utils.distributed import gather_objects, rank_of

if TYPE_CHECKING:
    from iada.training.trainer import Trainer

PARTS = ("backbone", "head", "optimizer", "scheduler", "method")


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """What `take_up` takes, the random state of all ranks included."""
    random = seeds.capture(trainer._device)
    return {
        "config": trainer.config.settings(),
        "labels": _labels(trainer),
        **{name: part.state_dict() for name, part in _parts(trainer).items()},
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "first_loss": trainer._first_loss,
        "measures": trainer._measures.whole_state(trainer.group),
        "history": trainer.history,
        "random_state": gather_objects(random, trainer.group),
    }


def take_up(trainer: "Trainer", state: dict[str, Any]) -> None:
    """The inverse; ValueError, with nothing changed, for the state of another run."""
    check_same_run(trainer.config, state["config"])
    check_same_labels(_labels(trainer), state.get("labels", {}))  # earlier versions kept none
    load_parts(_parts(trainer), state)
    trainer.epoch, trainer.batch = state["epoch"], state["batch"]
    trainer._first_loss = state.get("first_loss")
    trainer.history = state["history"]
    rank = rank_of(trainer.group)
    if rank > 0:
        trainer._measures.forget_counts()  # rank 0 has those of all
    if rank < len(state["random_state"]):
        seeds.restore(state["random_state"][rank], trainer._device)
    else:  # more ranks than before
        seed = seeds.seed_of(trainer.config.seed, rank, trainer._step)
        seeds.seed_all(seed, trainer._device)


def _labels(trainer: "Trainer") -> dict[str, str | None]:
    """By which data sets are known: what is kept for each sample belongs to those in its place."""
    return {name: digest_of(getattr(trainer, name)) for name in ("train_set", "meta_set")}


def _parts(trainer: "Trainer") -> dict[str, Any]:
    """What has a state_dict of its own."""
    parts = {name: getattr(trainer, name) for name in PARTS} | {"measures": trainer._measures}
    if hasattr(trainer.observe, "load_state_dict"):
        parts["observe"] = trainer.observe
    return parts
