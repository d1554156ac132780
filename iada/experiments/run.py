"""One run of a recipe: a method and a seed, resumable, described by one record."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iada.experiments.datasets import Labelled
from iada.experiments.diagnostics import TermsLog, spectrum, surrogate_gap
from iada.experiments.epsilon_log import EpsilonLog
from iada.experiments.experiment import Limits, Views, limited, make_views
from iada.experiments.first_phase import FOLDER, first_phase_digest, take_up_first_phase
from iada.experiments.metrics import Measured, measure
from iada.experiments.recipe import MethodEntry, Recipe
from iada.experiments.scenarios import Split
from iada.experiments.watch import Watch
from iada.models import build_backbone
from iada.training.config import TrainerConfig
from iada.training.first_phase import can_share, first_phase_config
from iada.training.trainer import CHECKPOINT, Trainer
from iada.utils.checks import complain
from iada.utils.distributed import (
    by_first,
    current_group,
    gather_objects,
    size_of,
)
from iada.utils.files import atomic_write, check_writable
from iada.utils.lock import folder_lock
from iada_kernels.environment import environment

RECORD, REQUEST = "record.json", "run.json"
MOST_EIGENVALUES = 6400  # kept in a record: all of 100 classes with 64 features
GAP_ROWS = 500  # training samples that the surrogate is checked on
RENAMED = {"departures": "deviations", "strengths": "epsilon"}


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run is made; none of it changes what is trained.

    progress: whether to show it, or as what.
    """

    folder: Path
    device: torch.device
    workers: int = 0
    progress: bool | str = False
    tensorboard: bool = False
    evaluate_every: int = 1
    root: Path | None = None


def run(
    recipe: Recipe,
    entry: MethodEntry,
    seed: int,
    split: Split,
    limits: Limits,
    run_options: RunOptions,
) -> dict[str, Any]:
    """Train, or go on, in `run_options.folder`; the record, which is kept there as record.json.

    A run that has its record already is not made again. ValueError if the folder holds one with
    other settings or on other data, finished or begun: run.json is what it was begun with; or if
    another process is at it.
    """
    split = split.with_meta_in_train() if entry.with_meta else split
    with contextlib.ExitStack() as entered:
        by_first(lambda: _enter(run_options.folder, entered), current_group())
        return _run(recipe, entry, seed, split, limits, run_options)


def _enter(folder: Path, entered: contextlib.ExitStack) -> None:
    check_writable(folder)
    entered.enter_context(folder_lock(folder))


def _run(
    recipe: Recipe,
    entry: MethodEntry,
    seed: int,
    split: Split,
    limits: Limits,
    run_options: RunOptions,
) -> dict[str, Any]:
    trainer, views, watch = prepare(recipe, entry, seed, split, limits, run_options)
    request = _request(recipe, entry, seed, trainer, split, limits)
    if any(other != request for other in gather_objects(request, trainer.group)):
        remedy = "start all processes on the same files, or one process alone"
        raise complain("--data", "the same split on every process", "several", remedy)
    finished = by_first(lambda: _begin(request, split, run_options), trainer.group)
    if finished is not None:
        return finished
    resumed = trainer.resume()
    start = time.monotonic()
    if run_options.root is not None and not trainer.epoch and not trainer.batch:
        _share_first_phase(recipe, entry, trainer, split, run_options)
    trainer.fit()
    seconds = time.monotonic() - start
    watch.gather()

    def measured() -> dict[str, Any]:
        last = _measure(trainer, views.test, split.test, split)
        record = {
            **request,
            "class_names": list(split.test.class_names),
            **_epochs(trainer.history, recipe, last),
            "confusion": last.confusion,
            "group_accuracy": last.group_accuracy,
            "curve": _curve(trainer.history, watch.terms),
            "epsilon": watch.epsilon.as_record(),
            **_covariance(trainer, views),
            # Of this call alone, where a run was interrupted.
            "seconds": None if resumed else seconds,
            "machine": _machine(run_options.device, size_of(trainer.group)),
        }
        _write(run_options.folder / RECORD, record)
        return record

    return by_first(measured, trainer.group)


def _begin(request: dict[str, Any], split: Split, run_options: RunOptions) -> dict[str, Any] | None:
    """The record of this run if it has been made; else its folder is prepared for it."""
    record, requested = run_options.folder / RECORD, run_options.folder / REQUEST
    if record.exists():
        return _previous(record, request)
    equal = None if run_options.root is None else _equal_run(run_options.root, request)
    if equal is not None:
        _write(record, equal)
        return equal
    if requested.exists() and (run_options.folder / CHECKPOINT).exists():
        _previous(requested, request)
    _write(requested, request)
    split.save(run_options.folder)
    return None


def prepare(
    recipe: Recipe,
    entry: MethodEntry,
    seed: int,
    split: Split,
    limits: Limits,
    run_options: RunOptions,
) -> "tuple[Trainer, Views, Watch]":
    """The trainer of a run, with nothing done yet."""
    recipe = limited(recipe, limits)
    entry = next(limited for limited in recipe.methods if limited.key == entry.key)
    config = dataclasses.replace(entry.trainer, seed=seed)
    return build_trainer(recipe, entry, config, split, run_options)


def build_trainer(
    recipe: Recipe, entry: MethodEntry, config: TrainerConfig, split: Split, run_options: RunOptions
) -> "tuple[Trainer, Views, Watch]":
    """The trainer of these settings on the recipe's model and data."""
    seed = config.seed
    views = make_views(recipe, entry, split, run_options.device)
    torch.manual_seed(seed)
    model = recipe.model
    backbone, head = build_backbone(
        model.backbone,
        split.train.num_classes,
        pretrained=model.pretrained,
        image_size=model.image_size,
    )
    watch = Watch(
        TermsLog(),
        EpsilonLog(split.train.labels, split.wrong, split.train.num_classes, config.epochs).to(
            run_options.device
        ),
    )

    def measures(trainer: Trainer) -> dict[str, float | None]:
        epoch = trainer.epoch + 1
        if epoch % run_options.evaluate_every and epoch < config.epochs:
            return {}
        measured: dict[str, float | None] = {}
        for name in ("validation", "test"):
            data = getattr(split, name)
            if data is not None:
                metrics = _measure(trainer, getattr(views, name), data, split).metrics
                measured |= {f"{name}_{metric}": value for metric, value in metrics.items()}
                measured.setdefault("accuracy", metrics["balanced"])  # shown while it runs
        return measured

    trainer = Trainer(
        backbone.to(run_options.device),
        head.to(run_options.device),
        views.train,
        views.meta,
        config,
        class_counts=split.train.class_counts(),
        folder=run_options.folder,
        observe=watch,
        measure=measures,
        progress=run_options.progress,
        num_workers=run_options.workers,
        tensorboard=run_options.tensorboard,
    )
    return trainer, views, watch


def _share_first_phase(
    recipe: Recipe, entry: MethodEntry, trainer: Trainer, split: Split, run_options: RunOptions
) -> None:
    """Start from the epochs of CE that other runs of the folder have in common with this one."""
    if run_options.root is None or not can_share(trainer.config):
        return
    folder = run_options.root / FOLDER / first_phase_digest(recipe, trainer, split)
    phase_options = dataclasses.replace(run_options, folder=folder, root=None)
    config = first_phase_config(trainer.config)
    phase, _, _ = build_trainer(recipe, entry, config, split, phase_options)
    take_up_first_phase(trainer, phase, split)


def _equal_run(root: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a finished run with the same settings on the same data, under this name."""
    names = ("experiment", "title", "method", "method_name")
    for path in sorted(root.rglob(RECORD)):
        try:
            record = renamed(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            continue  # whoever asks for that run is told
        if all(_agrees(record, name, request[name]) for name in request if name not in names):
            same_as = record.get("same_as", path.parent.relative_to(root).as_posix())
            return {**record, **request, "same_as": same_as}
    return None


def _request(
    recipe: Recipe,
    entry: MethodEntry,
    seed: int,
    trainer: Trainer,
    split: Split,
    limits: Limits,
) -> dict[str, Any]:
    """What decides the result, by which a record is known."""
    return json.loads(  # as it will be read again: tuples are lists
        json.dumps(
            {
                "experiment": recipe.name,
                "title": recipe.title,
                "method": entry.key,
                "method_name": entry.title,
                "seed": seed,
                "settings": dataclasses.asdict(trainer.config),
                "model": dataclasses.asdict(recipe.model),
                "split": split.record,
                "deviations": limits.words(entry.trainer.epochs),
                "class_counts": split.train.class_counts().tolist(),
            }
        )
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _machine(device: torch.device, processes: int) -> dict[str, str]:
    """The machine, and what of it trains."""
    machine = {"device": str(device), **environment(device)}
    return machine if processes == 1 else {**machine, "processes": str(processes)}


def _previous(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a previous run wrote to `path`; ValueError if it is not of the same request."""
    try:
        previous = renamed(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        got = f"a damaged file ({error})"
        raise complain(str(path), "a run's record", got, "delete it: the run goes on") from error
    for name, value in request.items():
        if name not in ("title", "method_name") and not _agrees(previous, name, value):
            raise complain(
                str(path.parent),
                "no run, or one with the same settings",
                f"one with another {name}",
                "choose another --out, or move it",
            )
    return previous


def renamed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with today's names for what earlier versions called otherwise."""
    return {RENAMED.get(name, name): value for name, value in record.items()}


def _agrees(record: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a record has this value; a setting that its version did not know had its default."""
    known = record.get(name)
    if name == "settings" and isinstance(known, dict):
        known = {**json.loads(json.dumps(dataclasses.asdict(TrainerConfig()))), **known}
    return known == value


def _measure(trainer: Trainer, view: Any, data: Labelled, split: Split) -> Measured:
    outputs = trainer.outputs(view)
    groups: dict[str, Any] = {}
    if data.groups is not None and split.train.groups is not None:
        counts = split.train.group_counts()
        groups = {"groups": data.groups, "group_names": data.group_names, "group_counts": counts}
    measured = measure(outputs.logits.float(), outputs.labels, split.train.class_counts(), **groups)
    if data.members is None:
        return measured
    hit = outputs.logits.argmax(dim=1) == outputs.labels  # WILDS: groups that overlap
    shares = {
        name: float(hit[member].double().mean()) if member.any() else None
        for name, member in zip(data.member_names, data.members.T, strict=True)
    }
    known = [share for share in shares.values() if share is not None]
    metrics = {**measured.metrics, "worst_group": min(known), "weighted_average": None}
    return measured._replace(metrics=metrics, group_accuracy=shares)


def _epochs(history: Sequence[Mapping[str, Any]], recipe: Recipe, last: Measured) -> dict[str, Any]:
    """The last epoch and the best: by the validation set where the protocol has one, else, as
    several published tables have it, by the test set."""
    metric = recipe.metrics[-1] if "worst_group" in recipe.metrics else recipe.metrics[0]
    judge = f"validation_{metric}"
    if not any(judge in row for row in history):
        judge = f"test_{metric}"
    best = max(history, key=lambda row: -1.0 if row.get(judge) is None else row[judge])
    prefix = "test_"
    figures = {name.removeprefix(prefix): v for name, v in best.items() if name.startswith(prefix)}
    return {
        "last": last.metrics,
        "best": figures,
        "best_epoch": best["epoch"],
        "best_by": judge,
    }


def _curve(history: Sequence[Mapping[str, Any]], terms: TermsLog) -> list[dict[str, Any]]:
    by_epoch = {row["epoch"]: row for row in terms.summary()}
    return [
        {
            "epoch": row["epoch"],
            "loss": row["loss"],
            "accuracy": row.get("test_balanced"),
            **by_epoch.get(row["epoch"], {}),
        }
        for row in history
    ]


def _covariance(trainer: Trainer, views: Views) -> dict[str, Any]:
    """The spectrum of Σ and how tight the surrogate is, where the method has a Σ."""
    covariance = trainer.method.covariance
    if covariance is None or covariance.covariance.shape[:2].numel() > MOST_EIGENVALUES:
        return {"spectrum": None, "surrogate": None}
    count = len(views.train)  # type: ignore[arg-type]
    chosen = torch.arange(GAP_ROWS) * count // GAP_ROWS if count > GAP_ROWS else torch.arange(count)
    outputs = trainer.outputs(views.train, rows=chosen)
    head = trainer.method.head
    gap = surrogate_gap(
        outputs.features.float(),
        head.weight.detach().cpu(),
        None if head.bias is None else head.bias.detach().cpu(),
        outputs.labels,
        covariance=covariance.covariance.cpu(),
        alpha=float(trainer.method.alpha),
        samples=200,
    )
    return {"spectrum": spectrum(covariance).tolist(), "surrogate": gap.as_record()}
