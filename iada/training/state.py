"""The state of a run, from which it goes on: everything that decides what comes after."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from iada.training.checkpoint import load_parts
from iada.training.config import TrainerConfig, check_same_run
from iada.training.measures import EpochMeasures
from iada.training.run_data import check_same_labels, digest_of
from iada.utils import seeds
from iada.utils.distributed import Group, gather_objects, rank_of


@dataclass(frozen=True)
class Place:
    """How far a run is: `batch` steps into `epoch`, with the rows of the epochs before."""

    epoch: int
    batch: int
    first_loss: float | None  # of this phase
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class RunParts:
    """What a run is made of: settings and data must be the same again, the rest is loaded.

    `stateful` are those with a state_dict of their own, by the names that a checkpoint has.
    """

    config: TrainerConfig
    data: Mapping[str, Dataset | None]
    stateful: Mapping[str, Any]
    measures: EpochMeasures
    device: torch.device
    group: Group

    def state_dict(self, place: Place) -> dict[str, Any]:
        """What `take_up` takes, the random state of all ranks included."""
        random = seeds.capture(self.device)
        return {
            "config": self.config.settings(),
            "labels": self._labels(),
            **{name: part.state_dict() for name, part in self.stateful.items()},
            "epoch": place.epoch,
            "batch": place.batch,
            "first_loss": place.first_loss,
            "measures": self.measures.whole_state(self.group),
            "history": place.history,
            "random_state": gather_objects(random, self.group),
        }

    def take_up(self, state: dict[str, Any]) -> Place:
        """Load `state` into all parts; ValueError, with nothing changed, for another run's."""
        check_same_run(self.config, state["config"])
        check_same_labels(self._labels(), state.get("labels", {}))  # earlier versions kept none
        load_parts({**self.stateful, "measures": self.measures}, state)
        place = Place(state["epoch"], state["batch"], state.get("first_loss"), state["history"])
        rank = rank_of(self.group)
        if rank > 0:
            self.measures.forget_counts()  # rank 0 has those of all
        if rank < len(state["random_state"]):
            seeds.restore(state["random_state"][rank], self.device)
        else:  # more ranks than before
            step = place.epoch * len(self.measures.losses) + place.batch
            seeds.seed_all(seeds.seed_of(self.config.seed, rank, step), self.device)
        return place

    def _labels(self) -> dict[str, str | None]:
        """By which data sets are known: what is kept of each sample belongs to those in place."""
        return {name: digest_of(dataset) for name, dataset in self.data.items()}
