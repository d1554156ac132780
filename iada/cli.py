"""`python -m iada`: `train`, `predict`, `export`, `labels`; `paper`, `features`; `demo`."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from iada.experiments import recipe as recipes
from iada.experiments.command import add_paper, say
from iada.experiments.datasets.files import arrays_of
from iada.experiments.demo import add_demo
from iada.experiments.experiment import Limits, make_split, read_parts
from iada.experiments.features import add_features
from iada.experiments.labels import add_labels
from iada.experiments.own_data import add_own_data, check_none_given, train_own
from iada.experiments.predict import add_predict
from iada.methods.meta_iada import LearnedCovarianceOptions
from iada.methods.options import BilevelOptions, CovarianceOptions
from iada.methods.registry import METHODS
from iada.models import mlp
from iada.training.config import TrainerConfig
from iada.training.loggers import logger_package, open_logger
from iada.training.trainer import Trainer
from iada.utils.checks import argument_error, check_choice
from iada.utils.distributed import (
    by_first,
    current_group,
    launched_group,
    launched_rank,
    rank_of,
    told_by_first,
)
from iada.utils.files import write_text
from iada.utils.loading import TensorData
from iada.utils.settings import check_settings, from_table, read_toml
from iada.utils.workers import LostWorkers
from iada_kernels.version import __version__

CONFIG_REMEDY = (
    "set it in the TOML file, or as --set trainer.method=ce trainer.epochs=9 trainer.seed=1 "
    "model.device=cpu"
)
PARTS = ("train", "meta", "validation", "test")


@dataclass(frozen=True)
class DataConfig:
    """[data]: where the arrays are.

    kind: "digits" (scikit-learn's, made worse by scenario "long-tail" or "noise": the demo's split
    of seed 0), or "npz".
    path: an .npz file with arrays {train,meta,validation,test}_inputs (N, ...) of floats and
    ..._labels (N) of integers; meta and validation may be absent, and train_groups (N) of integers
    is for methods that know groups. A relative path counts from the configuration's folder.
    """

    kind: str = "digits"
    scenario: str = "long-tail"
    path: str = ""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ModelConfig:
    """[model]: an MLP. hidden: widths of its hidden layers. device: a torch device."""

    hidden: tuple[int, ...] = (128, 64)
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.hidden or min(self.hidden) < 1:
            raise argument_error("hidden", "widths from 1", repr(self.hidden), "as in [128, 64]")
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            got = f"{self.device!r} ({reason})"
            raise argument_error("device", "a torch device", got, "try 'cpu'") from error


SECTIONS = {
    "data": from_table(DataConfig),
    "model": from_table(ModelConfig),
    "trainer": TrainerConfig.from_settings,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. 130 after Ctrl-C, 2 for an error in the input."""
    parser = argparse.ArgumentParser(prog="python -m iada", description=__doc__)
    parser.add_argument("--version", action="version", version=f"iada {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands)
    _add_train(commands)
    add_paper(commands)
    add_features(commands)
    add_predict(commands)
    add_labels(commands)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.words = ["python", "-m", "iada", *words]  # for reports to say what made them
    try:
        return options.run(options)
    except KeyboardInterrupt as stop:
        if launched_rank() == 0:
            print(f"\n{_stopped(stop, options)}")
        return 130
    except BrokenPipeError:  # as `| head` leaves behind
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError, LostWorkers) as error:
        if not told_by_first(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        text = str(error)
        if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
            extra = {"paper": "paper", "demo": "demo"}.get(options.command, "own")
            text = f"{error.name} is not installed; pip install 'iada[{extra}]'"
        print(f"error: {text}", file=sys.stderr)
        return 2


def _stopped(stop: KeyboardInterrupt, options: argparse.Namespace) -> str:
    """What a stopped command says; what it left in the folder of a run is gone on from by it."""
    where, begun, _ = (str(stop) or "stopped").partition("; resume from ")
    if begun and options.command == "train" and options.data is None:
        return f"{stop}: the same command with --resume goes on"
    if begun and options.command in ("train", "labels", "paper"):
        where += f"; the same command goes on, with --out {shlex.quote(str(options.out))}"
    return where


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="train on data of your own, or by a TOML configuration",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_settings_help(),
        epilog="Ctrl-C finishes the step and leaves a checkpoint, from which the same command goes "
        "on; with --config it takes --resume.\n"
        "With several processes: torchrun --nproc-per-node 2 -m iada train --config run.toml",
    )
    parser.add_argument("--data", type=Path, help="data of your own")
    parser.add_argument("--config", type=Path, help="or a TOML file, see above")
    parser.add_argument("--out", type=Path, default=Path("runs/run"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    add_own_data(parser)
    parser.set_defaults(run=_train)


def _settings_help() -> str:
    """What a configuration may hold: the sections, and of [trainer] each method's options."""
    parts = [inspect.getdoc(kind) for kind in (DataConfig, ModelConfig, TrainerConfig)]
    for name, kind in METHODS.items():
        options = ", ".join(field.name for field in dataclasses.fields(kind)) or "no options"
        parts.append(f"method = {name!r}, with {options}\n{inspect.getdoc(kind)}")
    parts += [
        inspect.getdoc(kind)
        for kind in (BilevelOptions, CovarianceOptions, LearnedCovarianceOptions)
    ]
    return "\n\n".join(map(str, parts))


def _train(options: argparse.Namespace) -> int:
    if (options.config is None) == (options.data is None):
        got = "neither" if options.data is None else "both"
        remedy = "python -m iada train --data PHOTOS trains on a folder of class folders"
        raise argument_error("train", "--data PATH or --config FILE", got, remedy)
    if options.data is None:
        check_none_given(options, options.own_only, "--config", CONFIG_REMEDY)
    with launched_group():
        return _train_here(options) if options.data is None else train_own(options)


def _train_here(options: argparse.Namespace) -> int:
    sections = read_toml(options.config, SECTIONS, recipes.changes_of(options.changes))
    data, model, config = sections["data"], sections["model"], sections["trainer"]
    if options.logger is not None:
        logger_package(options.logger)
    parts = _load_data(data, options.config.parent)
    num_classes = 1 + max(int(part.labels.max()) for part in parts.values())
    first = rank_of(current_group()) == 0
    torch.manual_seed(config.seed)
    backbone, head = mlp(parts["train"].inputs[0].numel(), model.hidden, num_classes)
    trainer = Trainer(
        backbone.to(model.device),
        head.to(model.device),
        parts["train"],
        parts.get("meta"),
        config,
        folder=options.out,
        validation_set=parts.get("validation"),
        progress=first,
        tensorboard=options.tensorboard,
    )
    if options.resume:
        say("resumed" if trainer.resume() else f"nothing to resume in {options.out}: from new")
    else:
        by_first(lambda: _check_fresh(options.out), trainer.group)
    with contextlib.ExitStack() as entered:
        if options.logger is not None and first:
            settings = config.settings()
            logger = open_logger(options.logger, options.out.name, options.out, settings)
            trainer.logger = entered.enter_context(logger)
        trainer.fit()
    accuracy = trainer.class_accuracy(parts["test"])
    balanced = float(accuracy.nanmean())
    result = {
        "config": config.settings(),
        "history": trainer.history,
        "data": dataclasses.asdict(data),
        "model": dataclasses.asdict(model),
        "test_class_accuracy": [None if math.isnan(a) else a for a in accuracy.tolist()],
        "test_balanced_accuracy": balanced,
    }
    text = json.dumps(result, indent=1) + "\n"
    by_first(lambda: write_text(options.out / "result.json", text), trainer.group)
    say(f"balanced test accuracy {100 * balanced:.2f} %")
    say(f"written: {options.out / 'result.json'}")
    return 0


def _check_fresh(folder: Path) -> None:
    if (folder / "checkpoint.pt").exists():
        remedy = "add --resume, or move it"
        raise argument_error("--out", "a folder without a checkpoint", folder, remedy)


def _load_data(data: DataConfig, folder: Path) -> dict[str, TensorData]:
    check_choice("[data] kind", data.kind, ("digits", "npz"))
    return _load_digits(data.scenario) if data.kind == "digits" else _load_npz(folder / data.path)


def _load_digits(scenario: str) -> dict[str, TensorData]:
    rows = [name.removeprefix("digits/") for name in recipes.names() if name.startswith("digits/")]
    check_choice("[data] scenario", scenario, rows)
    recipe = recipes.load(f"digits/{scenario}")
    split = make_split(recipe, read_parts(recipe, None, Limits()), seed=0)
    parts = {name: getattr(split, name) for name in PARTS}
    return {
        name: TensorData(part.inputs.flatten(1) / 255, part.labels) for name, part in parts.items()
    }


def _load_npz(path: Path) -> dict[str, TensorData]:
    try:
        arrays = arrays_of(path, "an .npz file")
    except (OSError, ValueError) as error:
        expected = f"an .npz file at {path}"
        raise argument_error("[data] path", expected, error, "see --help") from error
    parts: dict[str, TensorData] = {}
    for part in PARTS:
        keys = f"{part}_inputs", f"{part}_labels"
        if not set(keys) & set(arrays) and part in ("meta", "validation"):
            continue
        missing = sorted(set(keys) - set(arrays))
        if missing:
            raise argument_error(path, ", ".join(keys), f"no {missing[0]}", "add the array")
        inputs, labels = (arrays[key] for key in keys)
        if inputs.ndim < 2 or inputs.dtype.kind not in "fiu" or not np.isfinite(inputs).all():
            got = f"{inputs.dtype} of shape {inputs.shape}"
            remedy = "mend the array; NaN and infinity are not allowed"
            raise argument_error(f"{path} {keys[0]}", "finite numbers (N, ...)", got, remedy)
        _check_numbers(f"{path} {keys[1]}", labels, "class indices (N,) from 0")
        if len(inputs) != len(labels) or not len(inputs):
            expected = "as many labels as inputs, at least one"
            got = f"{len(inputs)} inputs and {len(labels)} labels"
            raise argument_error(f"{path} {part}", expected, got, "mend the arrays")
        if parts and inputs.shape[1:] != parts["train"].inputs.shape[1:]:
            shape = tuple(parts["train"].inputs.shape[1:])
            expected = f"samples of shape {shape}, as in train"
            raise argument_error(f"{path} {keys[0]}", expected, inputs.shape[1:], "mend it")
        groups = arrays.get(f"{part}_groups")
        if groups is not None:
            expected = f"a group from 0 for each input, ({len(inputs)},)"
            _check_numbers(f"{path} {part}_groups", groups, expected, len(inputs))
        parts[part] = TensorData(
            torch.from_numpy(inputs.astype(np.float32)),
            torch.from_numpy(labels.astype(np.int64)),
            None if groups is None else torch.from_numpy(groups.astype(np.int64)),
        )
    return parts


def _check_numbers(name: str, numbers: np.ndarray, expected: str, count: int | None = None) -> None:
    """Whole numbers from 0, (N,), as many as `count` if that is given."""
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu" and not (numbers < 0).any()
    if not whole or (count is not None and len(numbers) != count):
        got = f"{numbers.dtype} of shape {numbers.shape}, or negative ones"
        raise argument_error(name, expected, got, "mend the array")
