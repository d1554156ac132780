"""Algorithm 1 whole: plain CE to T1, then the method to T2, with checkpoints and resume."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.baselines import FirstOrder
from iada.checkpoint import load_checkpoint, save_checkpoint
from iada.config import TrainerConfig
from iada.covariance import ClassCovariance
from iada.data import TensorData, batches, epoch_order, stream_order
from iada.interrupt import stop_flag
from iada.meta import MetaIADA, MetaStep
from iada.perturbation import PerturbationNet
from iada.sample_characteristics import TrainingMemory
from iada.validation import check_label_values, complain

CHECKPOINT = "checkpoint.pt"


class Trainer:
    """Trains a backbone and a linear head by one of `iada.config.METHODS`.

    >>> trainer = iada.Trainer(backbone, head, train_set, meta_set, config, folder="runs/a")
    >>> trainer.fit()
    >>> trainer.class_accuracy(test_set).mean()

    Args:
        backbone: module from inputs to features (N, A).
        head: nn.Linear(A, C).
        train_set: items (input, label); `TensorData`, or any map-style data set.
        meta_set: the same, small, clean and balanced; None for methods other than "meta-iada".
        config: a `TrainerConfig`.
        class_counts: training samples of each class (C); read from the labels of a `TensorData`.
        folder: where checkpoint.pt is kept; None for no checkpoints.
        observe: called after each step of the second phase with (trainer, batch, result): result
            is a `MetaStep`, or the loss of a baseline.
        validation_set: measured after each epoch into `history`.
        progress: show a bar, if tqdm is installed.
        num_workers: of the training loader.

    A stopped run goes on bit for bit on a CPU: torch's random state is saved, and the order of the
    data follows from the seed. Randomness of the data set's own (numpy's, Python's, or a worker's
    within an epoch) is not saved. Modules in eval mode inside a backbone in training mode stay so.

    Attributes:
        history: one dict an epoch: epoch, loss, and accuracy (mean over classes) where there is
            a validation set.
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
        progress: bool = False,
        num_workers: int = 0,
    ) -> None:
        if not isinstance(head, nn.Linear):
            got = f"a {type(head).__name__}"
            raise complain("head", "an nn.Linear", got, "split the model before its last layer")
        named = {"train_set": train_set, "meta_set": meta_set, "validation_set": validation_set}
        for name, dataset in named.items():
            if dataset is not None and len(dataset) == 0:  # type: ignore[arg-type]
                raise complain(name, "at least one sample", "none", "check how it was selected")
        if config.method == "meta-iada" and meta_set is None:
            raise complain(
                "meta_set", "a small clean data set", "None", "pass one, or choose another method"
            )
        self.config = config
        self.backbone, self.head = backbone, head
        self.train_set, self.meta_set = train_set, meta_set
        self.validation_set = validation_set
        self.folder = None if folder is None else Path(folder)
        self.observe, self.progress, self.num_workers = observe, progress, num_workers
        if class_counts is None:
            class_counts = _count_classes(train_set, head.out_features)
        self.optimizer = torch.optim.SGD(
            [p for p in self._parameters() if p.requires_grad],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.scheduler = _schedule(self.optimizer, config)
        self.method = self._build_method(class_counts)
        self.epoch = 0
        self.batch = 0
        self.history: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []

    def fit(self) -> list[dict[str, Any]]:
        """Train from wherever the state stands to the last epoch; returns `history`.

        Ctrl-C or SIGTERM finishes the step, leaves a checkpoint in `folder` and raises
        KeyboardInterrupt. A loss that is not finite raises FloatingPointError naming the step,
        with the last checkpoint intact.
        """
        with self._bar() as tick, stop_flag() as stopped:
            while self.epoch < self.config.epochs:
                if not self._run_epoch(stopped):
                    self._check_losses()  # a diverged state must not replace a good checkpoint
                    self.save()
                    where = "" if self.folder is None else f"; resume from {self.folder}"
                    raise KeyboardInterrupt(f"stopped at epoch {self.epoch}{where}")
                tick()
        return self.history

    def _run_epoch(self, stopped: Callable[[], bool]) -> bool:
        """The rest of the current epoch; False if asked to stop before its end."""
        config, epoch = self.config, self.epoch
        order = epoch_order(len(self.train_set), config.batch_size, config.seed, epoch)  # type: ignore[arg-type]
        rest = order[self.batch :]
        meta_phase = epoch >= config.ce_epochs
        meta_batches = self._meta_batches(len(order), len(rest)) if meta_phase else None
        self._set_alpha()
        if not self.backbone.training:  # else parts that were put into eval mode stay there
            self.backbone.train()
        seed = config.seed * 1_000_003 + self._step
        for batch in batches(self.train_set, rest, self.num_workers, seed):
            batch = self._to_device(batch)
            try:
                if meta_phase:
                    meta_batch = None if meta_batches is None else next(meta_batches)
                    result = self.method.step(batch, meta_batch)  # type: ignore[arg-type]
                else:
                    result = self.method.cross_entropy_step(batch)
            except ValueError as error:  # the checks of values see a diverged classifier first
                if all(bool(torch.isfinite(p).all()) for p in self._parameters()):
                    raise
                raise _diverged("a classifier that is not finite", self._step, epoch) from error
            self._losses.append(result.loss if isinstance(result, MetaStep) else result)
            if meta_phase and self.observe is not None:
                self.observe(self, batch, result)
            self.batch += 1
            if self.batch < len(order) and stopped():
                return False
        self._end_epoch()
        return not stopped()

    def _end_epoch(self) -> None:
        mean_loss = self._check_losses()
        record: dict[str, Any] = {"epoch": self.epoch, "loss": mean_loss}
        if self.validation_set is not None:
            record["accuracy"] = float(self.class_accuracy(self.validation_set).nanmean())
        self.history.append(record)
        if isinstance(self.method, MetaIADA):
            self.method.memory.end_epoch()
        self.scheduler.step()
        self.epoch, self.batch, self._losses = self.epoch + 1, 0, []
        if self.epoch % self.config.checkpoint_every == 0 or self.epoch == self.config.epochs:
            self.save()

    def _check_losses(self) -> float:
        """The mean of the epoch's losses so far; FloatingPointError if one is not finite."""
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            first = int(bad[0, 0])
            step = self._step - len(losses) + first
            raise _diverged(str(float(losses[first])), step, self.epoch)
        return float(losses.mean())

    @torch.no_grad()
    def class_accuracy(self, dataset: Dataset, batch_size: int = 512) -> Tensor:
        """Accuracy of each class on `dataset`, (C) float64; NaN for a class without samples."""
        num_classes = self.head.out_features
        right = torch.zeros(num_classes, dtype=torch.float64)
        total = torch.zeros(num_classes, dtype=torch.float64)
        rows = torch.arange(len(dataset)).split(batch_size)  # type: ignore[arg-type]
        with _evaluating(self.backbone, self.head):
            for batch in batches(dataset, [part.tolist() for part in rows]):
                inputs, labels, *_ = self._to_device(batch)
                hit = (self.head(self.backbone(inputs)).argmax(dim=1) == labels).cpu()
                right.index_add_(0, labels.cpu(), hit.double())
                total.index_add_(0, labels.cpu(), torch.ones(len(hit), dtype=torch.float64))
        return right / total

    def save(self) -> None:
        """Write checkpoint.pt into `folder`, all or nothing; nothing without a folder."""
        if self.folder is None:
            return
        save_checkpoint(self.folder / CHECKPOINT, self.state_dict())

    def resume(self) -> bool:
        """Take up checkpoint.pt in `folder` if there is one; whether there was."""
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return False
        self.load_state_dict(load_checkpoint(self.folder / CHECKPOINT))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on, the random state included."""
        cuda = self.head.weight.device.type == "cuda"
        return {
            "config": dataclasses.asdict(self.config),
            "backbone": self.backbone.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": list(self._losses),
            "history": self.history,
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state_all() if cuda else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises ValueError, with nothing changed, if the run had other settings (`checkpoint_every`
        may differ, and `epochs` where no schedule depends on it), or if the model is another.
        """
        self._check_same_run(state["config"])
        try:
            self.backbone.load_state_dict(state["backbone"])
            self.head.load_state_dict(state["head"])
            self.method.load_state_dict(state["method"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"checkpoint: expected the model and data of this run, got another's ({error}); "
                "build the same backbone, head and data set, or choose another folder"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._losses = [loss.to(self.head.weight.device) for loss in state["losses"]]
        self.history = state["history"]
        torch.set_rng_state(state["random_state"])
        if state["cuda_random_state"]:
            torch.cuda.set_rng_state_all(state["cuda_random_state"])

    def _check_same_run(self, former: dict[str, Any]) -> None:
        config = self.config
        free = {"checkpoint_every"}
        if config.schedule != "cosine" and not config.alpha_ramp:
            free.add("epochs")
        for name, value in dataclasses.asdict(config).items():
            if name not in free and former.get(name) != value:
                raise complain(
                    f"checkpoint's {name}",
                    f"{value!r} as in this run's settings",
                    repr(former.get(name)),
                    "resume with the former settings, or choose another folder",
                )

    def _build_method(self, class_counts: Tensor) -> FirstOrder | MetaIADA:
        config, weight = self.config, self.head.weight
        shape = (self.head.out_features, self.head.in_features)
        shared = (self.backbone, self.head, self.optimizer, class_counts)
        covariance = None
        dtype = torch.promote_types(torch.float32, weight.dtype)
        if config.method in ("isda", "meta-iada"):
            covariance = ClassCovariance(*shape, config.structure).to(weight.device, dtype)
        if config.method != "meta-iada":
            return FirstOrder(
                *shared,
                covariance=covariance,
                alpha=config.alpha,
                beta=config.beta if config.method == "logit-adjustment" else 0.0,
                clip_norm=config.clip_norm,
            )
        perturbation = PerturbationNet().to(weight.device, dtype)
        memory = TrainingMemory(shape[0], len(self.train_set))  # type: ignore[arg-type]
        return MetaIADA(
            *shared,
            perturbation=perturbation,
            perturbation_optimizer=torch.optim.Adam(
                perturbation.parameters(), lr=config.perturbation_lr
            ),
            covariance=covariance,
            memory=memory.to(weight.device, dtype),
            alpha=config.alpha,
            beta=config.beta,
            covariance_lr=config.covariance_lr,
            persistent=config.persistent,
            project=config.project,
            clip_norm=config.clip_norm,
        )

    def _meta_batches(self, steps: int, rest: int) -> Iterator[Any] | None:
        if not isinstance(self.method, MetaIADA):
            return None
        first = self.epoch * steps + self.batch
        size = len(self.meta_set)  # type: ignore[arg-type]
        config = self.config
        order = list(stream_order(size, config.meta_batch_size, config.seed, first, rest))
        assert self.meta_set is not None
        return map(self._to_device, batches(self.meta_set, order))

    def _set_alpha(self) -> None:
        config = self.config
        share = 1.0
        if config.alpha_ramp:
            share = (self.epoch - config.ce_epochs + 1) / max(1, config.epochs - config.ce_epochs)
        self.method.alpha = config.alpha * max(0.0, share)

    @property
    def _step(self) -> int:
        """Steps done since the start of the run."""
        count = len(self.train_set)  # type: ignore[arg-type]
        return self.epoch * max(1, -(-count // self.config.batch_size)) + self.batch

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self.backbone.parameters()
        yield from self.head.parameters()

    def _to_device(self, batch: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(_moved(part, self.head.weight.device) for part in batch)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        if not self.progress or importlib.util.find_spec("tqdm") is None:
            yield lambda: None
            return
        from tqdm.auto import tqdm

        with tqdm(total=self.config.epochs, initial=self.epoch, unit="epoch") as bar:

            def tick() -> None:
                last = self.history[-1]
                bar.set_postfix({k: f"{v:.4f}" for k, v in last.items() if k != "epoch"})
                bar.update()

            yield tick


def _moved(part: Any, device: torch.device) -> Any:
    """Tensors, also those in dicts (a tokenizer's output), lists and tuples, on `device`."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, dict):
        return {key: _moved(value, device) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(_moved(value, device) for value in part)
    return part


def _diverged(got: str, step: int, epoch: int) -> FloatingPointError:
    return FloatingPointError(
        f"loss: expected a finite number, got {got} at step {step} (epoch {epoch}); try a smaller "
        "lr or alpha, alpha_ramp=true, or clip_norm"
    )


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode while inside; afterwards each module in the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainerConfig
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if config.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, config.epochs)
    milestones = list(config.milestones) if config.schedule == "multistep" else []
    return schedulers.MultiStepLR(optimizer, milestones, config.gamma)


def _count_classes(train_set: Dataset, num_classes: int) -> Tensor:
    if isinstance(train_set, TensorData):
        check_label_values(train_set.labels, num_classes, None)
        return torch.bincount(train_set.labels, minlength=num_classes)
    raise complain(
        "class_counts",
        f"samples of each class, ({num_classes},)",
        "None",
        "pass torch.bincount(training_labels, minlength=C)",
    )
