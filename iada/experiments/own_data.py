"""`python -m iada train --data`: methods on data of your own, and a report of them."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from iada.experiments import recipe as recipes
from iada.experiments.command import (
    check_at_least,
    check_out,
    check_processes,
    device_named,
    run_methods,
    say,
    with_methods,
)
from iada.experiments.datasets.own import KINDS, folders_read
from iada.experiments.experiment import Limits, Parts, check_data, read_parts
from iada.experiments.progress import Series
from iada.experiments.recipe import MethodEntry, Recipe
from iada.experiments.run import RunOptions
from iada.methods.options import BilevelOptions
from iada.models import BUILT_IN
from iada.training.loggers import LOGGERS, logger_package
from iada.utils.checks import argument_error
from iada.utils.distributed import by_first, current_group

BASE = "base/own"
PRETRAINED_LR = 0.01  # weights that know something are moved less
EITHER_WAY = ("tensorboard", "logger", "changes")  # options of a --config too
FLAGS = {"changes": "set"}  # of options with another name than their flag
RANKING = ("meta-iada", "metasaug")  # methods whose runs know each sample's ε or loss


def add_own_data(parser: argparse.ArgumentParser) -> None:
    """Add the options of training on data of your own."""
    own = parser.add_argument_group("on data of your own", f"They are {KINDS}.")
    own_only: list[str] = []

    def add(flag: str, **settings: Any) -> None:
        own_only.append(own.add_argument(flag, **settings).dest)

    add(
        "--method",
        nargs="+",
        metavar="M",
        help=f"one or several of {', '.join(recipes.sections_of(BASE)['methods'])}, or of a recipe "
        "(default meta-iada)",
    )
    add("--backbone", help="resnet32, timm/NAME, torchvision/NAME, mlp (features), …")
    add("--pretrained", action="store_true", help="with its library's weights")
    add("--image-size", type=int, help="pixels a side (default 64; of libraries 224)")
    add("--epochs", type=int, help="of the whole run (default 60)")
    add(
        "--meta-per-class",
        type=int,
        metavar="N",
        help="training samples of each class that become the clean meta set (default 10)",
    )
    add("--meta", metavar="PATH", help="a clean meta set, in place of these")
    add(
        "--validation",
        metavar="SHARE|PATH",
        help="what is held out of training, or where it lies (default 0.2)",
    )
    add("--test", metavar="SHARE|PATH", help="the same, to be tested on at the end")
    add("--seeds", type=int, metavar="N", help="runs of each (default 1)")
    add("--recipe", type=Path, metavar="FILE", help="a TOML file of such settings")
    add("--device", help="a torch device (default: the accelerator, or cpu)")
    add("--workers", type=int, help="processes that load image files (default 0)")
    own.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")
    own.add_argument("--logger", choices=list(LOGGERS), help="another log beside log.csv")
    own.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="changes",
        help="change a setting, as in trainer.lr=0.01",
    )
    parser.set_defaults(own_only=tuple(own_only))


def check_none_given(
    options: argparse.Namespace, names: Sequence[str], beside: str, remedy: str
) -> None:
    """ValueError naming those of these options that are given, beside what has no use for them."""
    values = {name: getattr(options, name) for name in names}
    given = [n for n, value in values.items() if value not in (None, []) and value is not False]
    if given:
        flags = ", ".join("--" + FLAGS.get(name, name).replace("_", "-") for name in given)
        raise argument_error(flags, "options of training on --data", f"{beside} with them", remedy)


def train_own(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    recipe = own_recipe(options)
    train_methods(recipe, options)
    new = "NEW.npz" if options.data.suffix.lower() == ".npz" else "PHOTOS"
    say(next_commands(recipe, options.out, new))
    return 0


def train_methods(recipe: Recipe, options: argparse.Namespace) -> None:
    """Read the data, and train each of the recipe's methods with each seed."""
    check_at_least(1, options, "seeds")
    if options.logger is not None:
        logger_package(options.logger)
    by_first(lambda: _prepare(recipe, options), current_group())  # before reading all the images
    say(f"reading {options.data}")
    parts = read_parts(recipe, options.data, Limits())
    if "meta" in parts and options.meta_per_class:
        expected = "none, as the data has a meta set of its own"
        raise argument_error("--meta-per-class", expected, options.meta_per_class, "leave it out")
    recipe = with_fair_meta(fitting(recipe, parts, options.backbone), given="meta" in parts)
    if not {"validation", "test"} & set(parts):
        expected = "a share of the samples to hold out, or a path"
        raise argument_error("--validation", expected, "none", "pass 0.2, or the path of others")
    counts = parts["train"].class_counts()
    sizes = {name: f"{len(part)} for {name}" for name, part in parts.items() if name != "train"}
    if "meta" in parts and not any(needs_meta(recipe)):
        titles = ", ".join(entry.title for entry in recipe.methods)
        sizes["meta"] += f" (which {titles} makes no use of)"
    held = ", ".join(sizes.values())
    say(
        f"{len(counts)} classes of {int(counts.min())} to {int(counts.max())} training samples, "
        f"{held}; backbone {recipe.model.backbone}"
    )
    run_options = RunOptions(
        options.out,
        device_named(options.device),
        options.workers or 0,
        tensorboard=options.tensorboard,
        logger=options.logger,
        data=options.data,
    )
    if current_group() is not None:
        check_processes([recipe], run_options.device)
    seeds = range(1 if options.seeds is None else options.seeds)
    series = Series([(recipe, entry, seed) for seed in seeds for entry in recipe.methods])
    run_methods(recipe, parts, seeds, Limits(), run_options, series, shlex.join(options.words))


def _prepare(recipe: Recipe, options: argparse.Namespace) -> None:
    """A folder for the runs, outside of the data, which would be read with them the next time."""
    check_data(recipe, options.data)
    given = [recipe.data.get(name) for name in ("meta", "validation", "test")]
    out = options.out.resolve()
    for source in [options.data, *(Path(path) for path in given if isinstance(path, str) and path)]:
        read = [folder.resolve() for folder in folders_read(source)]
        if out == source.resolve() or any(out.is_relative_to(folder) for folder in read):
            remedy = "pass another: what is written there would be read as data"
            got = f"{options.out}, which is in {source}"
            raise argument_error("--out", "a folder outside of the data", got, remedy)
    check_out(options.out)


def labels_run(recipe: Recipe, out: Path) -> Path | None:
    """The first run in `out` that ranks labels; None where no method does."""
    by_name = {entry.trainer.method_name: entry.key for entry in reversed(recipe.methods)}
    key = next((by_name[name] for name in RANKING if name in by_name), None)
    return None if key is None else out / key / "seed0"


def next_commands(recipe: Recipe, out: Path, new: str) -> str:
    """What may be done with one of the runs in `out`: one that ranks labels, or the first.

    new: how samples to be classified are named.
    """
    ranking = labels_run(recipe, out)
    run = shlex.quote(str(ranking or out / recipe.methods[0].key / "seed0"))
    lines = [f"labels {run}"] * (ranking is not None)
    lines += [f"predict {run} {new}", f"export {run} MODEL.safetensors"]
    return "\n".join(["Next:", *(f"  python -m iada {line}" for line in lines)])


def own_recipe(options: argparse.Namespace) -> Recipe:
    """base/own, the file of `--recipe`, the options, and `--set`, each over those before."""
    sections = recipes.sections_of(BASE)
    own: recipes.Sections = {} if options.recipe is None else recipes.sections_of(options.recipe)
    backbone = options.backbone or own.get("model", {}).get("backbone", "")
    pretrained = options.pretrained or own.get("model", {}).get("pretrained", False)
    if "/" in backbone:  # a library's: made for images of another size than small ones are
        library: recipes.Sections = {"model": {"image_size": 224}, "data": {"memory": False}}
        sections = recipes.merged(sections, library)
    if pretrained:
        sections = recipes.merged(sections, {"trainer": {"lr": PRETRAINED_LR}})
    sections = recipes.merged(sections, {"experiment": {"title": options.data.resolve().stem}})
    sections = recipes.with_own(sections, own)
    if options.meta is not None and options.meta_per_class:
        remedy = "leave one of them out"
        raise argument_error("--meta", "no --meta-per-class beside it", "both", remedy)
    given: recipes.Sections = {
        "model": {
            "backbone": options.backbone,
            "image_size": options.image_size,
            "pretrained": options.pretrained or None,
        },
        "trainer": {"epochs": options.epochs},
        "scenario": {"meta_per_class": options.meta_per_class if options.meta is None else 0},
        "data": {
            "meta": options.meta,
            "validation": _share_or_path(options.validation),
            "test": _share_or_path(options.test),
        },
    }
    changes: recipes.Sections = {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in given.items()
    }
    changes = recipes.merged(changes, recipes.changes_of(options.changes))
    recipe = recipes.from_sections(f"own/{options.data.resolve().stem}", sections, changes)
    paths = {
        name: str(Path(recipe.data[name]).resolve())  # for `labels` from another folder
        for name in ("meta", "validation", "test")
        if isinstance(recipe.data.get(name), str) and recipe.data[name]
    }
    recipe = replace(recipe, data={**recipe.data, **paths})
    return with_methods(recipe, options.method or ["meta-iada"], "--method")


def needs_meta(recipe: Recipe) -> list[bool]:
    """Whether each of the methods learns from a meta set."""
    return [isinstance(entry.trainer.method, BilevelOptions) for entry in recipe.methods]


def with_fair_meta(recipe: Recipe, given: bool) -> Recipe:
    """A meta set only where a method learns from it, and its samples as training samples of the
    methods that need none: all have seen the same. given: it is a part of the data, and stays so.
    """
    needing = needs_meta(recipe)
    scenario = dict(recipe.scenario)
    if given or not any(needing):
        scenario["meta_per_class"] = 0
    shared = any(needing) and scenario["meta_per_class"] and scenario["meta_from"] == "train"

    def fair(entry: MethodEntry, needs: bool) -> MethodEntry:
        if needs or not shared:
            return entry
        return replace(entry, with_meta=True, title=f"{entry.title} on train + meta")

    methods = tuple(map(fair, recipe.methods, needing))
    return replace(recipe, scenario=scenario, methods=methods)


def fitting(recipe: Recipe, parts: Parts, asked: str | None = None) -> Recipe:
    """The recipe with a backbone that can take these inputs; ValueError where it cannot.

    asked: the backbone that was asked for, and stays.
    """
    inputs, model = parts["train"].inputs, recipe.model
    default = recipes.sections_of(BASE)["model"]["backbone"]
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        kind, fits = "features", model.backbone in ("mlp", "identity")
        if model.backbone == default and asked is None:
            model, fits = replace(model, backbone="mlp"), True
        remedy = "pass --backbone mlp, or identity for a head alone"
    elif not isinstance(inputs, Tensor) and isinstance(inputs[0], str):
        kind, fits = "texts", model.backbone.startswith("transformers/")
        remedy = "pass --backbone transformers/FOLDER"
    else:
        kind = "images"
        fits = model.backbone in BUILT_IN or model.backbone.startswith(("timm/", "torchvision/"))
        remedy = "pass --backbone resnet32, timm/NAME or torchvision/NAME"
    if not fits:
        raise argument_error("--backbone", f"one for {kind}", repr(model.backbone), remedy)
    return replace(recipe, model=model)


def _share_or_path(text: str | None) -> float | str | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text
