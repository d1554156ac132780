"""Backbones by name: the built-in ones, and those of torchvision, timm and transformers."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iada.models.small import cifar_resnet, mlp, wide_resnet
from iada.models.split import split_classifier
from iada.utils.checks import argument_error

BUILT_IN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet8": (lambda: cifar_resnet(8), 64),
    "resnet20": (lambda: cifar_resnet(20), 64),
    "resnet32": (lambda: cifar_resnet(32), 64),
    "resnet56": (lambda: cifar_resnet(56), 64),
    "wrn-16-4": (lambda: wide_resnet(16, 4), 256),
    "wrn-28-10": (lambda: wide_resnet(28, 10), 640),
    "digits-mlp": (lambda: mlp(64, (128, 64), 10)[0], 64),  # of 8×8 grey images
}
LIBRARIES = ("torchvision", "timm", "transformers")


def build_backbone(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    weights: str = "",
    image_size: int = 224,
) -> tuple[nn.Module, nn.Linear]:
    """A backbone by name, and a linear head for `num_classes`.

    Args:
        name: one of BUILT_IN, "torchvision/NAME" or "timm/NAME" as these libraries name their
            models, or "transformers/PATH": a folder with a sequence classifier, or any model
            that AutoModelForSequenceClassification loads, such as distilbert-base-uncased.
        pretrained: the library's own weights, which it downloads where it does not have them yet.
            A folder of transformers has its weights anyway, and False starts from new ones.
        weights: of torchvision's pretrained ones which, as "IMAGENET1K_V1"; "" takes its newest.
        image_size: height and width of the images, for architectures that depend on it.

    Raises:
        ValueError: an unknown name, or a model that cannot be split.
        ModuleNotFoundError: the library is not installed.
    """
    if name in BUILT_IN:
        if pretrained:
            raise argument_error("pretrained", "False", "True", f"there are no weights for {name}")
        build, width = BUILT_IN[name]
        return build(), nn.Linear(width, num_classes)
    library, _, model_name = name.partition("/")
    if library not in LIBRARIES or not model_name:
        known = ", ".join([*BUILT_IN, *(f"{library}/NAME" for library in LIBRARIES)])
        raise argument_error("backbone", f"one of {known}", repr(name), "pass one of these")
    try:
        module = importlib.import_module(library)
    except ModuleNotFoundError as error:
        text = f"backbone {name}: {error.name} is not installed; pip install {library}"
        raise ModuleNotFoundError(text, name=error.name) from error
    if library == "transformers":
        model = _transformer(module, model_name, num_classes, pretrained)
        ids = torch.ones(1, 4, dtype=torch.int64)
        example: Any = {"input_ids": ids, "attention_mask": ids.clone()}
    else:
        chosen = weights or "DEFAULT" if pretrained else None
        model = _vision(module, library, model_name, num_classes, chosen)
        example = torch.zeros(1, 3, image_size, image_size)
    return split_classifier(model, example, num_classes)


def _vision(
    module: Any, library: str, name: str, num_classes: int, weights: str | None
) -> nn.Module:
    """One with weights keeps their classes: `split_classifier` gives it a new head."""
    if library == "torchvision":
        known = module.models.list_models(module=module.models)  # classifiers only
    else:
        known = module.list_models()
    if name not in known:
        close = [other for other in known if name.lower() in other.lower()][:5]
        expected = f"a model of {library}" + (f", such as {', '.join(close)}" if close else "")
        raise argument_error("backbone", expected, repr(name), f"see {library}'s list_models()")
    options: dict[str, Any] = {} if weights else {"num_classes": num_classes}
    if library == "timm":
        return module.create_model(name, pretrained=bool(weights), **options)
    try:
        return module.models.get_model(name, weights=weights, **options)
    except (ValueError, KeyError) as error:
        known = ", ".join(module.models.get_model_weights(name).__members__)
        remedy = "or leave it out"
        raise argument_error("weights", f"one of {known}", repr(weights), remedy) from error


def _transformer(module: Any, path: str, num_classes: int, pretrained: bool) -> nn.Module:
    try:
        config = module.AutoConfig.from_pretrained(path, num_labels=num_classes)
        kind = module.AutoModelForSequenceClassification
        if pretrained:
            return kind.from_pretrained(path, config=config)
        return kind.from_config(config)
    except (OSError, ValueError) as error:
        there = "a folder" if Path(path).exists() else "nothing at this path"
        got = f"{there}: {str(error).splitlines()[0]}"
        expected = "transformers/PATH, PATH with config.json of a sequence classifier"
        remedy = "save one there by model.save_pretrained(PATH)"
        raise argument_error("backbone", expected, got, remedy) from error
