"""Algorithm 1 whole: plain CE to T1, then the method to T2, with checkpoints and resume."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.meta.learner import check_classifier
from iada.meta.method import MetaStep, Method
from iada.nn.divergence import sign_of_divergence
from iada.training.acceleration import Acceleration
from iada.training.build_method import build_method, check_own_method
from iada.training.checkpoint import RunFolder
from iada.training.config import TrainerConfig, check_config
from iada.training.divergence import FINITE, LossWatch, all_finite, diverged
from iada.training.interrupt import stop_flag
from iada.training.logs import Logger, Logs, measured
from iada.training.measures import EpochMeasures, PhaseTimes, number_or_none
from iada.training.meta_stream import MetaStream
from iada.training.run_data import check_labels_at_hand, check_meta_set, check_sets
from iada.training.schedule import build_optimizer, build_schedule
from iada.training.state import Place, RunParts
from iada.utils import seeds as random_state
from iada.utils.checks import argument_error
from iada.utils.distributed import (
    Group,
    GroupReference,
    any_rank,
    broadcast,
    check_parts,
    current_group,
    own_part,
    rank_of,
)
from iada.utils.evaluate import Outputs, by_batch, class_accuracy, evaluating, outputs
from iada.utils.loading import batches, count_classes, epoch_order
from iada.utils.workers import loaders_ended, lost_workers_named


class Trainer:
    """Trains a backbone and a linear head by one of `iada.methods.registry.METHODS`, or your own.

    Examples:
        >>> config = iada.TrainerConfig(epochs=2, ce_epochs=1)
        >>> trainer = iada.Trainer(backbone, head, train_set, meta_set, config)
        >>> [row["epoch"] for row in trainer.fit()]
        [0, 1]
        >>> trainer.class_accuracy(meta_set).shape
        torch.Size([10])

    Args:
        backbone: module from inputs to features (N, A).
        head: nn.Linear(A, C).
        train_set: items (input, label); `TensorData`, or any map-style data set. Some methods need
            an attribute of it: `labels` or `groups`, integers (N).
        meta_set: the same, small, clean and balanced; may be None for methods that need none.
        config: a `TrainerConfig`.
        class_counts: training samples of each class (C); read from the labels of a `TensorData`.
        folder: where checkpoint.pt and log.csv are kept; None for neither.
        observe: called after each step with (trainer, batch, result): result is a `MetaStep` with
            the strengths of this batch, or, of a method without a meta set and while `plain_phase`,
            the loss (), detached. Its state is checkpointed if it has state_dict and
            load_state_dict.
        validation_set: measured after each epoch into `history` and the logs.
        measure: called after each epoch with the trainer, in evaluation mode; the numbers, or
            None, that it returns by name go into `history` and the logs too. One named "accuracy"
            is shown as that of a validation set is.
        progress: show a bar with tqdm where it is installed, else a line an epoch on stderr. A
            string is shown as its title.
        num_workers: of the loaders of training, meta set and evaluation, each; data in memory is
            read without.
        tensorboard: write the log for TensorBoard too, into `folder`.
        logger: called after each epoch with (steps so far, its numbers by name), on rank 0:
            `iada.open_logger` has those of TensorBoard, W&B and MLflow.
        method: an `iada.Method` of your own, built with this backbone and head, whose optimizer
            the schedule of `config` then moves; with `TrainerConfig(method=None)`.

    A stopped run goes on bit for bit on a CPU: the order of the data follows from the seed, as does
    what a data set draws from the global generators of torch, Python and numpy for each sample,
    with or without workers; their state, from which dropout draws, is saved. Generators that a data
    set keeps as its own are not. Modules in eval mode inside a backbone in training mode stay so.

    Where torch.distributed is initialised, each rank trains on its part of every batch, rank 0
    writes, and all ranks must make the same calls: docs/distributed.md.

    Attributes:
        history: one dict an epoch: epoch, loss, accuracy (mean over classes) where there is a
            validation set, and what `measure` returned. log.csv has more of the training itself.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        train_set: Dataset,
        meta_set: Dataset | None,
        config: TrainerConfig,
        *,
        class_counts: Tensor | None = None,
        folder: str | Path | None = None,
        observe: "Callable[[Trainer, Sequence[Any], Any], None] | None" = None,
        validation_set: Dataset | None = None,
        measure: "Callable[[Trainer], Mapping[str, float | None]] | None" = None,
        progress: bool | str = False,
        num_workers: int = 0,
        tensorboard: bool = False,
        logger: Logger | None = None,
        method: Method | None = None,
    ) -> None:
        check_classifier(backbone, head)
        check_config(config)
        sets = {"train_set": train_set, "meta_set": meta_set, "validation_set": validation_set}
        check_sets(sets)
        if method is None or class_counts is None:  # else labels are what its step makes of them
            check_labels_at_hand(sets, head.out_features)
        if tensorboard and folder is None:
            raise argument_error("folder", "one for TensorBoard's files", "None", "pass a folder")
        self.config = config
        self.backbone, self.head = backbone, head
        self.train_set, self.meta_set = train_set, meta_set
        self.validation_set = validation_set
        self._run_folder = None if folder is None else RunFolder(Path(folder))
        self.observe, self.measure = observe, measure
        self.progress, self.num_workers = progress, num_workers
        self.tensorboard, self.logger = tensorboard, logger
        self._group = GroupReference(current_group())
        rows = {"batch_size": len(train_set) // self._steps}  # type: ignore[arg-type]
        if meta_set is not None:
            rows["meta_batch_size"] = min(config.meta_batch_size, len(meta_set))  # type: ignore[arg-type]
        check_parts(rows, self.group)
        broadcast([*backbone.parameters(), *backbone.buffers(), *head.parameters()], self.group)
        if class_counts is None:
            class_counts = count_classes(train_set, head.out_features)
        self.acceleration = Acceleration(config, self._device)
        if method is None:
            stepped = self.acceleration.prepare(backbone)
            optimizer = build_optimizer(self._parameters(), config)
            parts = (stepped, head, optimizer, class_counts, train_set)
            method = build_method(config, *parts, self.group, num_workers)
        else:
            check_own_method(method, config, backbone, head)
        self.method, self.optimizer = method, method.optimizer
        self.scheduler = build_schedule(self.optimizer, config, self._steps)
        if self.method.needs_meta_batch:
            check_meta_set(train_set, meta_set)
        self._meta_stream: MetaStream | None = None
        self.epoch = 0
        self.batch = 0
        self.history: list[dict[str, Any]] = []
        self._first_loss: float | None = None  # of this phase
        self._measures = self._new_measures()
        self._times = PhaseTimes()

    @property
    def folder(self) -> Path | None:
        """Where checkpoint.pt and log.csv are kept."""
        return None if self._run_folder is None else self._run_folder.path

    @property
    def group(self) -> Group:
        """Of the processes that train together; None for one alone."""
        return self._group()

    def fit(self) -> list[dict[str, Any]]:
        """Train from wherever the state stands to the last epoch; returns `history`.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, after the step is finished and a checkpoint is in
                `folder`.
            FloatingPointError: divergence (docs/training.md has its signs); the message names the
                step, and the last checkpoint is intact.
            RuntimeError: a worker of a loader was killed.
            OSError: `folder` is full or cannot be written, found before training or with the last
                checkpoint intact.
            ValueError: `folder` has the checkpoint of another run, or another process trains in it.
        """
        config, rank = self.config, rank_of(self.group)
        if self.epoch == config.epochs:
            return self.history
        if rank > 0 and self._step == 0:  # else all ranks would draw the same dropout masks
            random_state.seed_all(random_state.seed_of(config.seed, rank), self._device)
        # Outermost: news of a worker's end may come while its loader is being closed.
        with (
            lost_workers_named(self.folder),
            stop_flag() as stopped,
            contextlib.ExitStack() as entered,
            loaders_ended(),
        ):
            if self._run_folder is not None:
                self._run_folder.enter(entered, self.group)
                if not self._run_folder.has_our_checkpoint:
                    self.save()
            entered.callback(setattr, self, "_meta_stream", None)  # ends its workers
            names = ("folder", "tensorboard", "progress", "logger") if rank == 0 else ()
            wanted = {name: getattr(self, name) for name in names}
            with Logs(self.epoch, config.epochs, self._steps, self.batch, **wanted) as logs:
                while self.epoch < config.epochs:
                    if not self._run_epoch(stopped, logs):
                        self.save()
                        where = "" if self.folder is None else f"; resume from {self.folder}"
                        raise KeyboardInterrupt(f"stopped at epoch {self.epoch}{where}")
        return self.history

    def _run_epoch(self, stopped: Callable[[], bool], logs: Logs) -> bool:
        """The rest of the current epoch; False if asked to stop, with a state to be saved."""
        config, epoch = self.config, self.epoch
        order = epoch_order(len(self.train_set), config.batch_size, config.seed, epoch)  # type: ignore[arg-type]
        rest: Sequence[list[int]] = order[self.batch :]
        meta_phase = not self.plain_phase
        alpha = config.alpha_at(epoch)
        if alpha is not None:
            self.method.alpha = alpha
        if not self.backbone.training:  # else parts that were put into eval mode stay there
            self.backbone.train()
        if self.batch == 0 and epoch in (0, config.ce_epochs):
            self._first_loss = None
        watch = self._loss_watch()
        if meta_phase:
            self.method.prepare()
            rest = self.method.begin_epoch(epoch, rest, self._step)
        train = self._loader(self.train_set, rest)
        for _ in rest:
            with self._times.phase("data"):
                batch = next(train)
                meta_batch = self.meta_batch() if meta_phase else None
            if meta_batch is not None:
                watch.expect_meta_losses(self.batch)
            with self._times.phase("step"):
                self.step_on(batch, meta_batch, meta_phase)
                watch.look(self.batch)
            logs.step()
            if self.batch < len(order) and any_rank(stopped(), self.group):
                self._check_sound(watch)  # a diverged state must not replace a good checkpoint
                return False
        with self._times.phase("step"):
            self._check_sound(watch)
        self._end_epoch(logs)
        return not any_rank(stopped(), self.group)

    def step_on(self, batch: Any, meta_batch: Any, meta_phase: bool) -> None:
        """One step of the method, or of plain CE before it."""
        try:
            with self.acceleration.autocast():
                if meta_phase:
                    result = self.method.step(batch, meta_batch)
                else:
                    result = self.method.cross_entropy_step(batch)
        except ValueError as error:  # the checks of values see a diverged classifier first
            if all_finite(self._parameters()):
                place = f"step {self._step}, epoch {self.epoch}"
                raise ValueError(f"{error} ({place})") from error
            got = "a classifier that is not finite"
            raise diverged("loss", FINITE, got, self._step, self.epoch) from error
        if isinstance(result, MetaStep) and result.epsilon is not None:
            own = result.epsilon[own_part(len(result.epsilon), self.group)]
            result = dataclasses.replace(result, epsilon=own)
        self._measures.record(self.batch, result, batch[1])
        if self.observe is not None:
            self.observe(self, batch, result)
        self.batch += 1
        if self.config.schedule_each == "step":
            self.scheduler.step()

    def _end_epoch(self, logs: Logs) -> None:
        covariance = self.method.covariance
        row = {"epoch": self.epoch, **self._measures.summary(covariance, self.group)}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        change = getattr(self.method, "covariance_change", None)
        change = None if change is None else number_or_none(change)
        row["covariance_change"] = change
        row["alpha"] = None if self.plain_phase else self.method.alpha
        if self.validation_set is not None:
            with self._times.phase("validation"):
                row["accuracy"] = float(self.class_accuracy(self.validation_set).nanmean())
        found: dict[str, float | None] = {}
        if self.measure is not None:
            models = (self.backbone, self.head)
            with self._times.phase("validation"), evaluating(*models):
                found = measured(self.measure(self))
        row |= found
        learned = () if change is None else ("covariance_change",)
        kept = ("epoch", "loss", "accuracy", *learned, *found)
        self.history.append({name: row[name] for name in kept if name in row})
        logs.write({**row, **self._times.take()})
        self.method.end_epoch()
        if self.config.schedule_each == "epoch":
            self.scheduler.step()
        self.epoch, self.batch, self._measures = self.epoch + 1, 0, self._new_measures()
        if self.epoch % self.config.checkpoint_every == 0 or self.epoch == self.config.epochs:
            with self._times.phase("checkpoint"):
                self.save()

    def _loss_watch(self) -> LossWatch:
        """Of the current epoch."""
        measures, least = self._measures, math.log(max(2, self.head.out_features))
        place = self.epoch, self._step - self.batch
        limit = self.config.loss_limit
        losses = measures.losses, measures.meta_losses
        # Where an epoch goes on, its meta losses so far have been looked at.
        return LossWatch(*losses, *place, limit, least, self._first_loss, meta_from=None)

    def _check_sound(self, watch: LossWatch) -> None:
        """FloatingPointError if a loss so far, or what the last step left, shows divergence."""
        watch.finish(self.batch)
        self._first_loss = watch.start
        place = self._step - 1, self.epoch
        if not all_finite([*self._parameters(), *self.method.learned()]):
            raise diverged("loss", FINITE, "parameters that are not finite", *place)
        if self.method.covariance is not None:
            sign = sign_of_divergence(self.method.head, self.method.covariance, self.method.alpha)
            if sign is not None:
                raise diverged("training", *sign, *place)

    def class_accuracy(self, dataset: Dataset, batch_size: int = 512) -> Tensor:
        """Accuracy of each class on `dataset`, (C) float64; NaN for a class without samples."""
        with self.acceleration.autocast():
            parts = (self.backbone, self.method.head, dataset, batch_size, self.num_workers)
            return class_accuracy(by_batch(*parts), self.head.out_features)

    def outputs(
        self, dataset: Dataset, batch_size: int = 512, rows: Tensor | None = None
    ) -> Outputs:
        """Features, logits and labels of `dataset` on the CPU, of all samples or of these rows."""
        with self.acceleration.autocast():
            return outputs(
                self.backbone, self.method.head, dataset, batch_size, self.num_workers, rows
            )

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
        place = Place(self.epoch, self.batch, self._first_loss, self.history)
        return self._run_parts().state_dict(place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: with nothing changed, if the run had other settings (see
                `iada.training.config.check_same_run`) or other labels, or if the model is another.
        """
        place = self._run_parts().take_up(state)
        self.epoch, self.batch = place.epoch, place.batch
        self._first_loss, self.history = place.first_loss, place.history

    def _run_parts(self) -> RunParts:
        names = ["backbone", "head", "optimizer", "scheduler", "method"]
        if hasattr(self.observe, "load_state_dict"):
            names.append("observe")
        stateful = {name: getattr(self, name) for name in names}
        data = {"train_set": self.train_set, "meta_set": self.meta_set}
        place = self._device, self.group
        return RunParts(self.config, data, stateful, self._measures, *place)

    def meta_batch(self) -> tuple[Any, ...] | None:
        """The next step's place in an endless stream of the meta set, if the method asks for it."""
        if self.meta_set is None or not self.method.needs_meta_batch:
            return None
        if self._meta_stream is None or self._meta_stream.step != self._step:
            needed = self.method.meta_steps(self.config.epochs * self._steps - self._step)
            place = (self.config.meta_batch_size, self.config.seed, self._step)
            self._meta_stream = MetaStream(
                self.meta_set, *place, needed, self.group, self.num_workers
            )
        return self.acceleration.placed(next(self._meta_stream))

    def _loader(self, dataset: Dataset, order: Sequence[list[int]]) -> Iterator[tuple[Any, ...]]:
        """This rank's part of each batch, the first one for the next step; on the device."""
        own = [rows[own_part(len(rows), self.group)] for rows in order]
        loader = batches(dataset, own, self.num_workers, self.config.seed, self._step)
        return map(self.acceleration.placed, loader)

    def _new_measures(self) -> EpochMeasures:
        dtype = torch.promote_types(torch.float32, self.head.weight.dtype)
        return EpochMeasures(self._steps, self.head.out_features).to(self._device, dtype)

    @property
    def plain_phase(self) -> bool:
        """Whether this epoch trains with plain CE, before the method's own: T1 of Algorithm 1."""
        return self.epoch < self.config.ce_epochs

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
