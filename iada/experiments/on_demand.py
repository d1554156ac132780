"""What is measured of a finished run when it is asked for, from the run's checkpoint.

The record takes it in: a run that has it already is not measured again.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from iada.experiments.datasets import FileView, Labelled, MemoryView
from iada.experiments.datasets.corruptions import (
    SEVERITIES,
    MadeCorruptions,
    PublishedCorruptions,
)
from iada.experiments.datasets.files import required
from iada.experiments.diagnostics.balance import balance_curve
from iada.experiments.diagnostics.corruption_accuracy import Source, corruption_accuracy
from iada.experiments.experiment import Parts, make_view
from iada.experiments.moved_record import check_images, moved_record
from iada.experiments.recipe import MethodEntry, Recipe
from iada.experiments.records import RECORD, Record, write_record
from iada.experiments.run import PlannedRun, build_trainer, entered_folder
from iada.methods.meta_iada import MetaIADAOptions
from iada.training.checkpoint import CHECKPOINT
from iada.training.trainer import Trainer
from iada.utils.checks import argument_error
from iada.utils.distributed import by_first

BALANCE, CORRUPTIONS, MOVED = "balance", "corruptions", "moved_features"  # in a record
NO_PILLOW = "images are written by Pillow: pip install 'iada[paper]'"


@dataclass(frozen=True)
class OnDemand:
    """What is asked for.

    corruptions: accuracy on corrupted test images, made here or, with a path, CIFAR-10-C's.
    moved_features: Fig. 5, of the methods that have an ε.
    balance: accuracy with τ log π taken from the logits, for τ from −1 to 1.5.
    """

    corruptions: bool | Path = False
    moved_features: bool = False
    balance: bool = False

    def __bool__(self) -> bool:
        return self != NOTHING


NOTHING = OnDemand()


def check_demand(demand: OnDemand, recipe: Recipe, parts: Parts) -> None:
    """ValueError for what this row cannot give: before the hours of its training, not after."""
    if demand.corruptions or demand.moved_features:
        required("PIL.Image", NO_PILLOW)
    if demand.moved_features:
        check_images(parts["train"])
        if not any(map(has_epsilon, recipe.methods)):
            got = ", ".join(entry.key for entry in recipe.methods)
            remedy = "pass --methods meta-iada, or leave the option out"
            raise argument_error("--moved-features", "a method with an ε", got, remedy)
    if demand.corruptions:
        data = parts.get("test", parts["train"])
        inputs: Any = data.inputs
        if not isinstance(inputs, Tensor) or inputs.is_floating_point():
            expected = "a row whose test images are in memory, all of one size"
            raise argument_error("--corruptions", expected, "another", "leave it out")
        source = _source(demand, data)
        if isinstance(source, PublishedCorruptions):
            _ = source.files
            whole = len(source.labels) // SEVERITIES
            if len(data) != whole:  # "clean" would be of other images
                expected = f"the whole test set, {whole} images, with {demand.corruptions}"
                remedy = "leave out --test-limit, or the folder's path"
                raise argument_error("--corruptions", expected, f"{len(data)}", remedy)


def has_epsilon(entry: MethodEntry) -> bool:
    """Whether the method perturbs features."""
    options = entry.trainer.method
    return isinstance(options, MetaIADAOptions) and (
        options.perturbation != "constant" or options.epsilon != 0
    )


def with_demand(planned: PlannedRun, record: Record, demand: OnDemand) -> tuple[Record, list[str]]:
    """The record of a finished run with what is asked for, and a line for each that was measured.

    It is written to the run's folder, once all is measured. ValueError where the checkpoint of the
    last epoch is not there.
    """
    wanted: dict[str, Callable[[Trainer, Tensor | None], dict[str, Any]]] = {}
    source = _source(demand, planned.split.test) if demand.corruptions else None
    if source is not None and not _has(record, source):
        wanted[CORRUPTIONS] = lambda trainer, _: _corruptions(trainer, planned, source)
    if demand.moved_features and has_epsilon(planned.entry) and not record.get(MOVED):
        wanted[MOVED] = lambda trainer, epsilon: _moved(trainer, planned, epsilon)
    if demand.balance and not record.get(BALANCE):
        wanted[BALANCE] = lambda trainer, _: _balance(trainer, planned)
    if not wanted:
        return record, []
    folder = planned.options.folder
    with entered_folder(folder):
        trainer, epsilon = _finished(planned, record)

        def measured() -> tuple[Record, list[str]]:
            found, lines = {}, []
            for name, measure in wanted.items():
                begun = time.monotonic()
                values = measure(trainer, epsilon)
                found[name] = {**values, "seconds": time.monotonic() - begun}
                lines.append(f"{name.replace('_', ' ')}: {_said(name, found[name])}")
            changed = {**record, **found}
            write_record(folder / RECORD, changed)
            return changed, lines

        return by_first(measured, trainer.group)


def _finished(planned: PlannedRun, record: Record) -> tuple[Trainer, Tensor | None]:
    """The trainer as the run left it, and each training sample's mean ε."""
    options = planned.options
    folder = options.folder
    if "same_as" in record and options.root is not None:  # the run that this one was equal to
        folder = options.root / record["same_as"]
    here = dataclasses.replace(options, folder=folder)
    trainer, _, watch = build_trainer(dataclasses.replace(planned, options=here))
    if not trainer.resume() or trainer.epoch < trainer.config.epochs:
        expected = f"the checkpoint of the last epoch, {CHECKPOINT}"
        remedy = "put it back, or move the folder: the run is then made again"
        raise argument_error(folder, expected, "none", remedy)
    watch.gather()
    return trainer, watch.epsilon.mean_epsilon()


def _source(demand: OnDemand, test: Labelled) -> Source:
    if isinstance(demand.corruptions, Path):
        return PublishedCorruptions(demand.corruptions, test)
    return MadeCorruptions(test)


def _has(record: Record, source: Source) -> bool:
    """Whether the record has the accuracies on these very corruptions."""
    known = record.get(CORRUPTIONS) or {}
    return all(known.get(name) == value for name, value in source.about.items())


def _corruptions(trainer: Trainer, planned: PlannedRun, source: Source) -> dict[str, Any]:
    def accuracy(data: Labelled) -> float:
        outputs = trainer.outputs(make_view(planned.recipe, data, planned.options.device))
        return float((outputs.logits.argmax(dim=1) == outputs.labels).double().mean())

    return corruption_accuracy(accuracy, source)


def _moved(trainer: Trainer, planned: PlannedRun, epsilon: Tensor | None) -> dict[str, Any]:
    view = make_view(planned.recipe, planned.split.train, planned.options.device)
    assert isinstance(view, MemoryView | FileView)
    return moved_record(trainer, view, planned.split, epsilon)


def _balance(trainer: Trainer, planned: PlannedRun) -> dict[str, Any]:
    outputs = trainer.outputs(make_view(planned.recipe, planned.split.test, planned.options.device))
    return balance_curve(outputs.logits, outputs.labels, planned.split.train.class_counts())


def _said(name: str, values: dict[str, Any]) -> str:
    seconds = f"{values['seconds']:.0f} s"
    if name == BALANCE:
        by_tau = dict(zip(values["tau"], values["top1"], strict=True))
        best = max(by_tau, key=by_tau.__getitem__)
        most, plain = 100 * by_tau[best], 100 * by_tau[0]
        return f"{most:.2f} % at τ = {best:g}, {plain:.2f} % at 0, in {seconds}"
    if name == CORRUPTIONS:
        mean, clean = 100 * values["mean"], 100 * values["clean"]
        return f"{mean:.2f} % on average, {clean:.2f} % clean, in {seconds}"
    samples: Sequence[Any] = values["samples"]
    return f"{len(samples)} training samples, in {seconds}"
