"""What a run is watched for while it trains, over all its processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from iada.experiments.diagnostics import TermsLog
from iada.experiments.epsilon_log import EpsilonLog
from iada.experiments.scenarios import Split
from iada.training.trainer import Trainer
from iada.utils.distributed import add_up, current_group, rank_of


@dataclass
class Watch:
    """What is looked at during training; an `observe` callback that checkpoints with the run.

    Each process looks at its own rows; the state is that of all, and the first's when it is loaded.
    """

    terms: TermsLog
    epsilon: EpsilonLog

    @classmethod
    def of(cls, split: Split, epochs: int, device: torch.device) -> Self:
        """For a run of so many epochs on a split."""
        train = split.train
        epsilon = EpsilonLog(train.labels, split.wrong, train.num_classes, epochs)
        return cls(TermsLog(), epsilon.to(device))

    def __call__(self, trainer: Trainer, batch: Sequence[Any], result: Any) -> None:
        if trainer.method.covariance is not None:
            self.terms(trainer, batch, result)
        self.epsilon(trainer, batch, result)

    def state_dict(self) -> dict[str, Any]:
        sums = {epoch: seen.clone() for epoch, seen in self.terms.state_dict()["sums"].items()}
        counts = {name: seen.clone() for name, seen in self.epsilon.state_dict().items()}
        add_up([*sums.values(), *counts.values()], current_group())
        return {"terms": {"sums": sums}, "epsilon": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if rank_of(current_group()) > 0:
            sums = {k: torch.zeros_like(seen) for k, seen in state["terms"]["sums"].items()}
            counts = {k: torch.zeros_like(seen) for k, seen in state["epsilon"].items()}
            state = {"terms": {"sums": sums}, "epsilon": counts}
        self._load(state)

    def gather(self) -> None:
        """What all processes have seen, on each; for the end of a run."""
        self._load(self.state_dict())

    def _load(self, state: dict[str, Any]) -> None:
        self.terms.load_state_dict(state["terms"])
        missing = {name: torch.zeros_like(v) for name, v in self.epsilon.state_dict().items()}
        self.epsilon.load_state_dict(missing | state["epsilon"])  # of versions that counted less
