"""One run of a recipe: a method and a seed, resumable, described by one record."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from iada.experiments.experiment import Limits, Views, make_view, make_views, shorter
from iada.experiments.first_phase import FOLDER, first_phase_digest, take_up_first_phase
from iada.experiments.model_file import (
    BEST,
    DESCRIPTION,
    SAMPLES,
    build_model,
    describe,
    feature_width,
    save_weights,
    write_samples,
)
from iada.experiments.outcome import (
    covariance_diagnostics,
    curve,
    epsilon_record,
    goodness,
    judge_of,
    last_and_best,
    measured_on,
)
from iada.experiments.recipe import MethodEntry, Recipe
from iada.experiments.records import RECORD, equal_run, previous_record, write_record
from iada.experiments.scenarios import Split
from iada.experiments.watch import Watch
from iada.training.checkpoint import CHECKPOINT
from iada.training.first_phase import can_share, first_phase_config
from iada.training.loggers import open_logger
from iada.training.trainer import Trainer
from iada.utils.checks import argument_error
from iada.utils.distributed import by_first, current_group, gather_objects, rank_of, size_of
from iada.utils.files import check_writable
from iada.utils.lock import folder_lock
from iada_kernels.environment import environment, source_commit

REQUEST = "run.json"


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run is made; none of it changes what is trained.

    root: the folder of all runs, of which equal ones and equal first phases are made once.
    progress: whether to show it, or as what.
    logger: one of `iada.training.loggers.LOGGERS`, for another log.
    data: where the data lies; with it the run keeps what others need to use its model: model.json,
    the weights of its best epoch and of its last, and samples.csv.
    """

    folder: Path
    device: torch.device
    workers: int = 0
    progress: bool | str = False
    tensorboard: bool = False
    evaluate_every: int = 1
    root: Path | None = None
    data: Path | None = None
    logger: str | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run: a method's entry with the seed and the schedule that it is trained by, on a split.

    deviations: from what was published, in words.
    """

    recipe: Recipe
    entry: MethodEntry
    split: Split
    deviations: list[str]
    options: RunOptions


def plan(
    recipe: Recipe, entry: MethodEntry, seed: int, split: Split, limits: Limits, options: RunOptions
) -> PlannedRun:
    """The run of a recipe's method on the split of a seed, smaller by `limits`."""
    deviations = limits.words(entry.trainer.epochs)
    entry = shorter(entry, limits)
    entry = dataclasses.replace(entry, trainer=dataclasses.replace(entry.trainer, seed=seed))
    split = split.with_meta_limit(entry.meta_per_class) if entry.meta_per_class else split
    split = split.with_meta_in_train() if entry.with_meta else split
    return PlannedRun(recipe.as_run(entry), entry, split, deviations, options)


def run(planned: PlannedRun) -> dict[str, Any]:
    """Train, or go on, in the options' folder; the record, which is kept there as record.json.

    A run that has its record already is not made again. ValueError if the folder holds one with
    other settings or on other data, finished or begun: run.json is what it was begun with; or if
    another process is at it.
    """
    with entered_folder(planned.options.folder):
        return _run(planned)


@contextlib.contextmanager
def entered_folder(folder: Path) -> Iterator[None]:
    """A run's folder, which can be written to and in which no other process is while inside."""

    def enter() -> None:
        check_writable(folder)
        entered.enter_context(folder_lock(folder))

    with contextlib.ExitStack() as entered:
        by_first(enter, current_group())
        yield


def _run(planned: PlannedRun) -> dict[str, Any]:
    options, split = planned.options, planned.split
    trainer, views, watch = build_trainer(planned)
    request = _request(planned, trainer)
    if any(other != request for other in gather_objects(request, trainer.group)):
        remedy = "start all processes on the same files, or one process alone"
        raise argument_error("--data", "the same split on every process", "several", remedy)
    finished = by_first(lambda: _begin(planned, trainer, request), trainer.group)
    if finished is not None:
        return finished
    resumed = trainer.resume()
    start = time.monotonic()
    if not trainer.epoch and not trainer.batch:
        _share_first_phase(planned, trainer)
    with _logger_of(planned, trainer):
        trainer.fit()
    seconds = time.monotonic() - start
    watch.gather()

    def measured() -> dict[str, Any]:
        last = measured_on(trainer, views.test, split.test, split, options.data is None)
        plain = make_view(planned.recipe, split.train, options.device)
        machine = {"device": str(options.device), **environment(options.device)}
        processes = size_of(trainer.group)
        record = {
            **request,
            "class_names": list(split.test.class_names),
            **last_and_best(trainer.history, planned.recipe, last),
            "tests": sum(row.get("test_top1") is not None for row in trainer.history),
            "confusion": last.confusion,
            "group_accuracy": last.group_accuracy,
            "curve": curve(trainer.history, watch.terms),
            "reliability": last.reliability,
            "epsilon": epsilon_record(watch.epsilon),
            **covariance_diagnostics(trainer, plain, watch.epsilon.mean_epsilon()),
            # Of this call alone, where a run was interrupted.
            "seconds": None if resumed else seconds,
            "finished": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
            "commit": source_commit(),
            "machine": machine | ({"processes": str(processes)} if processes > 1 else {}),
        }
        if options.data is not None:
            file = options.folder / SAMPLES
            write_samples(file, split, trainer.outputs(plain), watch.epsilon)
        write_record(options.folder / RECORD, record)
        return record

    return by_first(measured, trainer.group)


@contextlib.contextmanager
def _logger_of(planned: PlannedRun, trainer: Trainer) -> Iterator[None]:
    """The trainer's logger while inside; TensorBoard's log is the trainer's own."""
    options, recipe = planned.options, planned.recipe
    if options.logger in (None, "tensorboard") or rank_of(trainer.group) > 0:
        yield
        return
    name = f"{recipe.name} {planned.entry.key} seed {planned.entry.trainer.seed}"
    settings = {**recipe.model.as_record(), **trainer.config.settings()}
    with open_logger(options.logger, name, options.folder, settings) as trainer.logger:
        yield


def _begin(planned: PlannedRun, trainer: Trainer, request: dict[str, Any]) -> dict[str, Any] | None:
    """The record of this run if it has been made; else its folder is prepared for it."""
    folder, root = planned.options.folder, planned.options.root
    if (folder / RECORD).exists():
        return previous_record(folder / RECORD, request)
    equal = None if root is None else equal_run(root, request)
    if equal is not None:
        write_record(folder / RECORD, equal)
        return equal
    if (folder / REQUEST).exists() and (folder / CHECKPOINT).exists():
        previous_record(folder / REQUEST, request)
    write_record(folder / REQUEST, request)
    planned.split.save(folder)
    if planned.options.data is not None:
        data = {"path": str(planned.options.data.resolve()), **planned.recipe.data}
        about = describe(planned.recipe.model, planned.split.train, data, trainer.method.head)
        write_record(folder / DESCRIPTION, {**about, "method": planned.entry.trainer.method_name})
    return None


def build_trainer(planned: PlannedRun) -> tuple[Trainer, Views, Watch]:
    """The trainer of a run, with nothing done yet."""
    config, split, options = planned.entry.trainer, planned.split, planned.options
    views = make_views(planned.recipe, planned.entry, split, options.device)
    torch.manual_seed(config.seed)
    width = feature_width(split.train)
    backbone, head = build_model(planned.recipe.model, split.train.num_classes, width)
    watch = Watch.of(split, config.epochs, options.device)

    def measures(trainer: Trainer) -> dict[str, float | None]:
        epoch = trainer.epoch + 1
        if epoch % options.evaluate_every and epoch < config.epochs:
            return {}
        measured: dict[str, float | None] = {}
        for name in ("validation", "test"):
            data = getattr(split, name)
            if data is not None:
                view, trusted = getattr(views, name), options.data is None
                metrics = measured_on(trainer, view, data, split, trusted).metrics
                measured |= {f"{name}_{metric}": value for metric, value in metrics.items()}
                measured.setdefault("accuracy", metrics["balanced"])  # shown while it runs
        if options.data is not None:
            by_first(lambda: _keep_best(trainer, planned, measured), trainer.group)
        return measured

    trainer = Trainer(
        backbone.to(options.device),
        head.to(options.device),
        views.train,
        views.meta,
        config,
        class_counts=split.train.class_counts(),
        folder=options.folder,
        observe=watch,
        measure=measures,
        progress=options.progress,
        num_workers=options.workers,
        tensorboard=options.tensorboard or options.logger == "tensorboard",
    )
    return trainer, views, watch


def _keep_best(trainer: Trainer, planned: PlannedRun, measured: dict[str, float | None]) -> None:
    """Write the weights, if no epoch before has been as good."""
    judge = judge_of(planned.recipe, [measured])
    value = measured[judge]
    former = max((goodness(judge, row.get(judge)) for row in trainer.history), default=-math.inf)
    if value is not None and goodness(judge, value) > former:
        path, epoch = planned.options.folder / BEST, trainer.epoch + 1
        save_weights(path, trainer.backbone, trainer.head, epoch, {judge: value})


def _share_first_phase(planned: PlannedRun, trainer: Trainer) -> None:
    """Start from the epochs of CE that other runs of the folder have in common with this one."""
    root = planned.options.root
    if root is None or not can_share(trainer.config):
        return
    folder = root / FOLDER / first_phase_digest(planned.recipe, trainer, planned.split)
    options = dataclasses.replace(planned.options, folder=folder, root=None)
    entry = dataclasses.replace(planned.entry, trainer=first_phase_config(trainer.config))
    phase, _, _ = build_trainer(dataclasses.replace(planned, entry=entry, options=options))
    take_up_first_phase(trainer, phase, planned.split)


def _request(planned: PlannedRun, trainer: Trainer) -> dict[str, Any]:
    """What decides the result, by which a record is known."""
    recipe, entry, split = planned.recipe, planned.entry, planned.split
    request = {
        "experiment": recipe.name,
        "title": recipe.title,
        "method": entry.key,
        "method_name": entry.title,
        "seed": entry.trainer.seed,
        "settings": trainer.config.settings(),
        "model": recipe.model.as_record(),
        "split": split.record,
        "deviations": planned.deviations,
        "class_counts": split.train.class_counts().tolist(),
    }
    return json.loads(json.dumps(request))  # as it will be read again: tuples are lists
