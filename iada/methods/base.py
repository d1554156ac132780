"""What the trainer asks of a method: one optimizer step a batch, and a little around it."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from iada.meta.step_result import MetaStep
from iada.nn.class_covariance import ClassCovariance


class Method(Protocol):
    """Trains the backbone and head that it was built with.

    Attributes:
        alpha: of Eq. 6, set before each epoch; methods without that term leave it unread.
    """

    alpha: float

    @property
    def covariance(self) -> ClassCovariance | None:
        """Σ, if the method keeps one: for the log."""

    @property
    def head(self) -> nn.Linear:
        """From features to the logits that an evaluation goes by."""

    @property
    def needs_meta_batch(self) -> bool:
        """Whether the next `step` looks at its meta batch."""

    def meta_steps(self, count: int) -> Sequence[bool]:
        """Which of the next `count` steps will look at theirs, so that it can be loaded ahead."""

    def begin_epoch(
        self, epoch: int, order: Sequence[list[int]], first_step: int
    ) -> Sequence[list[int]]:
        """Called before the steps of each epoch of the method's own, and when one goes on.

        Args:
            epoch: of the run, from 0.
            order: rows of the training set for each step still to come in this epoch.
            first_step: of these, in the run.

        Returns the rows to be loaded for each of these steps; more than were given if the method
        wants further samples beside them.
        """

    def step(
        self, batch: Sequence[Any], meta_batch: Sequence[Any] | None = None
    ) -> Tensor | MetaStep:
        """One step on (inputs, labels, index); its loss (), or a `MetaStep`, detached."""

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """One step of plain CE, before the method's own epochs; its loss (), detached."""

    def end_epoch(self) -> None:
        """Called after each epoch, those of plain CE too."""

    def learned(self) -> list[Tensor]:
        """What must stay finite beside the parameters of backbone and head."""

    def state_dict(self) -> dict[str, Any]:
        """What the method knows beside backbone, head and optimizer."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
