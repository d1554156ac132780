"""A run: what is trained on what, where it stands, and the state from which it goes on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from iada.meta.method import Method
from iada.training.checkpoint import RunFolder, load_parts
from iada.training.config import TrainerConfig, check_same_run
from iada.training.measures import EpochMeasures
from iada.training.run_data import digest_of
from iada.utils import seeds as random_state
from iada.utils.checks import argument_error
from iada.utils.distributed import Group, GroupReference, current_group, gather_objects, rank_of


class Run:
    """What `iada.Trainer` trains, with its place and state.

    Data sets are known by their labels, where these are at hand: what is kept for each sample
    belongs to those in the same places.

    Attributes:
        epoch, batch: the place: epochs that are done, and batches of the current one.
        history: one dict an epoch.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        train_set: Dataset,
        meta_set: Dataset | None,
        config: TrainerConfig,
        folder: str | Path | None,
        observe: Callable[..., None] | None,
    ) -> None:
        self.config = config
        self.backbone, self.head = backbone, head
        self.train_set, self.meta_set = train_set, meta_set
        self.observe = observe
        self.epoch = 0
        self.batch = 0
        self.history: list[dict[str, Any]] = []
        self._labels = {"train_set": digest_of(train_set), "meta_set": digest_of(meta_set)}
        self._run_folder = None if folder is None else RunFolder(Path(folder))
        self._group = GroupReference(current_group())
        self._first_loss: float | None = None  # of this phase
        self._measures = self._new_measures()

    @property
    def folder(self) -> Path | None:
        """Where checkpoint.pt and log.csv are kept."""
        return None if self._run_folder is None else self._run_folder.path

    @property
    def group(self) -> Group:
        """Of the processes that train together; None for one alone."""
        return self._group()

    @property
    def plain_phase(self) -> bool:
        """Whether this epoch trains with plain CE, before the method's own: T1 of Algorithm 1."""
        return self.epoch < self.config.ce_epochs

    def save(self) -> None:
        """Write checkpoint.pt into `folder`, all or nothing; nothing without a folder."""
        if self._run_folder is not None:
            self._run_folder.save(self.state_dict(), self.group)

    def resume(self) -> bool:
        """Take up checkpoint.pt in `folder` if there is one; whether there was.

        Rank 0 reads it for all.
        """
        state = None if self._run_folder is None else self._run_folder.load(self.group)
        if self._run_folder is None or state is None:
            return False
        self.load_state_dict(state)
        self._run_folder.has_our_checkpoint = True
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on, the random state of all ranks included."""
        random = random_state.capture(self._device)
        return {
            "config": self.config.settings(),
            "labels": self._labels,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "epoch": self.epoch,
            "batch": self.batch,
            "first_loss": self._first_loss,
            "measures": self._measures.whole_state(self.group),
            "history": self.history,
            "random_state": gather_objects(random, self.group),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: with nothing changed, if the run had other settings (see
                `iada.training.config.check_same_run`) or other labels, or if the model is another.
        """
        check_same_run(self.config, state["config"])
        self._check_same_labels(state.get("labels", {}))  # which earlier versions did not keep
        load_parts(self._parts(), state)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._first_loss = state.get("first_loss")
        self.history = state["history"]
        rank = rank_of(self.group)
        if rank > 0:
            self._measures.forget_counts()  # rank 0 has those of all
        if rank < len(state["random_state"]):
            random_state.restore(state["random_state"][rank], self._device)
        else:  # more ranks than before
            seed = random_state.seed_of(self.config.seed, rank, self._step)
            random_state.seed_all(seed, self._device)

    def _check_same_labels(self, former: dict[str, str | None]) -> None:
        for name, digest in self._labels.items():
            known = former.get(name)
            if None not in (known, digest) and known != digest:
                expected = "the labels that the checkpoint's run had, in their order"
                remedy = "put the data set back as it was, or choose another folder"
                raise argument_error(name, expected, "others", remedy)

    def _parts(self) -> dict[str, Any]:
        """What has a state_dict of its own."""
        names = ("backbone", "head", "optimizer", "scheduler", "method")
        parts = {**{name: getattr(self, name) for name in names}, "measures": self._measures}
        if hasattr(self.observe, "load_state_dict"):
            parts["observe"] = self.observe
        return parts

    def _new_measures(self) -> EpochMeasures:
        dtype = torch.promote_types(torch.float32, self.head.weight.dtype)
        return EpochMeasures(self._steps, self.head.out_features).to(self._device, dtype)

    @property
    def _steps(self) -> int:
        """Steps of an epoch."""
        return max(1, -(-len(self.train_set) // self.config.batch_size))  # type: ignore[arg-type]

    @property
    def _step(self) -> int:
        """Steps done since the start of the run."""
        return self.epoch * self._steps + self.batch

    @property
    def _device(self) -> torch.device:
        return self.head.weight.device

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self.backbone.parameters()
        yield from self.head.parameters()
