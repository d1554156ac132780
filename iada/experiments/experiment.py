"""From a recipe and a path to data: the split of a seed, and what the trainer is given of it."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from iada.experiments.datasets import (
    BUNDLED,
    CIFAR10,
    IMAGENET,
    NORMALISATIONS,
    READERS,
    FeatureView,
    FileView,
    Labelled,
    MemoryView,
    TextView,
    load_tokenizer,
)
from iada.experiments.recipe import MethodEntry, ModelSettings, Recipe, shortened
from iada.experiments.scenarios import SCENARIOS, Split, colored_mnist
from iada.models import build_backbone
from iada.utils.checks import argument_error, check_choice
from iada.utils.evaluate import outputs

# As in huaxiuyao/LISA's cmnist_dataset.py: its third channel is empty.
COLORED_MNIST = ((0.1307, 0.1307, 0.0), (0.3081, 0.3081, 0.3081))
OF_READERS = {**NORMALISATIONS, "digits": ((0.0,), (1.0,)), "mnist": COLORED_MNIST}
# How the published protocols of these cut their images.
FILE_OPTIONS: dict[str, dict[str, Any]] = {
    "waterbirds": {"shape": "square", "scale": (0.7, 1.0)},
    "celeba": {"shape": "whole", "scale": (0.7, 1.0)},
    "own": {"photo": True},
}
Parts = dict[str, Labelled]


@dataclass(frozen=True)
class Limits:
    """What makes an experiment smaller than the published one, or another; 0 leaves it as it is.

    epochs: of training, all marks of the schedule in proportion.  train, test: images a class.
    changes: settings of the recipe that were changed, as they were given.
    """

    epochs: int = 0
    train: int = 0
    test: int = 0
    changes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != Limits()

    def words(self, published_epochs: int) -> list[str]:
        """Each of them for a person; published_epochs: of the whole schedule."""
        words = list(self.changes)
        if self.epochs:
            words.append(f"{self.epochs} of {published_epochs} epochs")
        if self.train:
            words.append(f"at most {self.train} training images a class")
        if self.test:
            words.append(f"at most {self.test} test images a class")
        return words


def read_parts(recipe: Recipe, path: Path | None, limits: Limits) -> Parts:
    """The data set at `path`, smaller by `limits`; None for one that is bundled."""
    options = dict(recipe.data)
    name, colored = options.pop("reader"), options.pop("colored", False)
    reader = READERS[name]
    check_data(recipe, path)
    _check_keys("data", options, reader, "reader", "colored")
    parts = reader(path, **options)
    if colored:
        parts = colored_mnist(parts)
    limit_of = {"train": limits.train, "test": limits.test, "validation": limits.test}
    return {part: first_of_each(data, limit_of.get(part, 0)) for part, data in parts.items()}


def check_data(recipe: Recipe, path: Path | None) -> None:
    """ValueError if there is nothing at the path of a data set that is not bundled."""
    if recipe.data["reader"] not in BUNDLED and (path is None or not path.exists()):
        raise argument_error("--data", recipe.needs, f"nothing at {path}", "pass where it lies")


def _check_keys(section: str, options: Iterable[str], taker: Callable, *others: str) -> None:
    """Each option is an argument of what takes them, beside its first."""
    known = [*others, *list(inspect.signature(taker).parameters)[1:]]
    for key in options:
        check_choice(f"[{section}] {key}", key, known, "rename or remove it")


def first_of_each(data: Labelled, count: int) -> Labelled:
    """At most `count` samples of each class, drawn alike for every seed; all of them for 0."""
    if not count:
        return data
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data)))
    labels = data.labels[order]
    chosen = [order[labels == c][:count] for c in range(data.num_classes)]
    return data.subset(torch.cat(chosen).sort().values)


def make_split(recipe: Recipe, parts: Parts, seed: int) -> Split:
    """The recipe's scenario on these parts."""
    options = dict(recipe.scenario)
    scenario = SCENARIOS[options.pop("name")]
    clustering = options.pop("clustering", None)
    weights = options.pop("clustering_weights", "")
    _check_keys("scenario", options, scenario)
    if weights and clustering is None:
        remedy = "name a backbone in scenario.clustering"
        raise argument_error("scenario.clustering_weights", "no weights", repr(weights), remedy)
    if clustering is not None:
        source = parts[options.get("meta_from", "validation")]
        options["features"] = _features(clustering, weights, source, recipe.model.image_size)
    return scenario(parts, seed=seed, **options)


def _features(backbone: str, weights: str, data: Labelled, size: int) -> Tensor:
    """Of a pre-trained backbone, (N, A); weights as `build_backbone` takes them."""
    own = {"pretrained": True, "weights": weights, "image_size": size}
    model, head = build_backbone(backbone, data.num_classes, **own)  # type: ignore[arg-type]
    device = best_device()
    return outputs(model.to(device), head.to(device), FileView(data, size=size), 256).features


@dataclass(frozen=True)
class Views:
    """The pieces of a split as the trainer takes them."""

    train: Dataset
    meta: Dataset | None
    validation: Dataset | None
    test: Dataset


def make_views(recipe: Recipe, entry: MethodEntry, split: Split, device: torch.device) -> Views:
    """Normalised images or tokens; images in memory lie on the device."""
    config, plain_from = entry.trainer, None
    last_epochs, _ = config.last_stage
    if last_epochs:
        steps = -(-len(split.train) // config.batch_size)
        plain_from = steps * (config.epochs - last_epochs)
    view = _view(recipe, split.train, plain_from, device)
    augment = recipe.model.augment if recipe.model.augment != "none" else None
    return Views(
        view(split.train, augment),
        None if split.meta is None else view(split.meta, augment),
        None if split.validation is None else view(split.validation, None),
        view(split.test, None),
    )


def make_view(recipe: Recipe, data: Labelled, device: torch.device) -> Dataset:
    """Normalised images or tokens without augmentation."""
    return _view(recipe, data, None, device)(data, None)


def _view(
    recipe: Recipe, data: Labelled, plain_from: int | None, device: torch.device
) -> Callable[[Labelled, str | None], Dataset]:
    model = recipe.model
    if isinstance(data.inputs, Tensor) and data.inputs.is_floating_point():
        _refuse_image_settings(model, "features")
        return lambda piece, augment: FeatureView(piece, device)
    if isinstance(data.inputs, Tensor):
        usual = CIFAR10 if data.inputs.shape[-1] <= 64 else IMAGENET
        means, deviations = OF_READERS.get(model.normalise or recipe.data["reader"], usual)
        channels = data.inputs.shape[1]  # one of MNIST's without its colours
        scale, padding = (means[:channels], deviations[:channels]), model.crop_padding
        return lambda piece, augment: MemoryView(piece, scale, augment, plain_from, device, padding)
    if isinstance(data.inputs[0], str):
        _refuse_image_settings(model, "texts")
        folder = model.backbone.removeprefix("transformers/")
        tokenizer = load_tokenizer(folder)
        return lambda piece, augment: TextView(piece, tokenizer)
    if model.augment.startswith("autoaugment"):
        remedy = "it is for small images"
        raise argument_error("augment", "'none' or 'crop-flip'", "image files", remedy)
    if model.crop_padding != "black":
        remedy = "leave it out: their crops are of what is there"
        raise argument_error("crop_padding", "small images", "image files", remedy)
    options = dict(FILE_OPTIONS.get(recipe.data["reader"], {}))
    if model.normalise:
        options["normalise"] = NORMALISATIONS[model.normalise]
    return lambda piece, augment: FileView(piece, augment is not None, model.image_size, **options)


def _refuse_image_settings(model: ModelSettings, got: str) -> None:
    """Those that are off by default: nobody sets them without meaning it."""
    for name, value in (("normalise", model.normalise), ("crop_padding", model.crop_padding)):
        if value not in ("", "black"):
            raise argument_error(name, "images", got, "leave it out")


def best_device() -> torch.device:
    """The accelerator, if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def limited(recipe: Recipe, limits: Limits) -> Recipe:
    """The recipe with its schedules in `limits.epochs` epochs."""
    return replace(recipe, methods=tuple(shorter(entry, limits) for entry in recipe.methods))


def shorter(entry: MethodEntry, limits: Limits) -> MethodEntry:
    """The method with its schedule in `limits.epochs` epochs."""
    if not limits.epochs:
        return entry
    return replace(entry, trainer=shortened(entry.trainer, limits.epochs))
