"""A trained classifier as files that others need nothing else for: weights, and what they are of.

A run's folder has model.json, best.pt (the best epoch's weights) and checkpoint.pt (the last
epoch's); `python -m iada export` writes one of the two as a single .safetensors file.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.experiments.datasets import (
    CIFAR10,
    IMAGENET,
    NORMALISATIONS,
    FeatureView,
    FileView,
    Labelled,
    MemoryView,
    TextView,
    load_tokenizer,
)
from iada.experiments.datasets.files import required
from iada.experiments.datasets.images import small_images
from iada.experiments.datasets.own import read_own
from iada.experiments.recipe import ModelSettings
from iada.experiments.records import read_json
from iada.experiments.scenarios import Split
from iada.experiments.scenarios.split import fingerprint
from iada.methods.ldam import CosineLinear
from iada.models import build_backbone, load_weights, mlp
from iada.training.checkpoint import CHECKPOINT
from iada.training.label_issues import SampleLog
from iada.utils.checks import argument_error
from iada.utils.evaluate import Outputs, outputs
from iada.utils.files import atomic_write, csv_text, load_plain, write_text
from iada_kernels.version import __version__

DESCRIPTION, BEST, SAMPLES = "model.json", "best.pt", "samples.csv"
WHICH = ("best", "last")
SAMPLE_COLUMNS = ("row", "path", "label", "prediction", "probability", "epsilon", "loss")
HIDDEN = (128, 64)  # of the backbone "mlp"
NO_SAFETENSORS = "safetensors is not installed; pip install 'iada[own]'"


@dataclass(frozen=True)
class TrainedModel:
    """A classifier with what it takes.

    backbone, head: in evaluation mode. about: of `describe`, and with it "epoch" of the weights.
    """

    backbone: nn.Module
    head: nn.Linear
    about: dict[str, Any]

    def outputs(self, data: Labelled, device: torch.device, workers: int = 0) -> Outputs:
        """Features, logits and (given) labels of samples like those it was trained on."""
        backbone, head = self.backbone.to(device), self.head.to(device)
        return outputs(backbone, head, self._view(data, device), num_workers=workers)

    def _view(self, data: Labelled, device: torch.device) -> Dataset:
        kind, size = self.about["inputs"], self.about["size"]
        sides = [size, size] if isinstance(size, int) else size
        scale: Any = tuple(map(tuple, self.about["normalise"]))
        got: Any = "image files"
        if isinstance(data.inputs, Tensor):
            features = data.inputs.is_floating_point()
            got = f"{data.inputs.dtype} {tuple(data.inputs.shape)}"
            if features and kind == "features" and data.inputs.shape[1] == size:
                return FeatureView(data, device)
            if not features and kind == "images" and list(data.inputs.shape[2:]) == sides:
                return MemoryView(data, scale, device=device)
        elif isinstance(data.inputs[0], str):
            got = "texts"
            if kind == "texts":
                name = self.about["model"]["backbone"].removeprefix("transformers/")
                return TextView(data, load_tokenizer(name))
        elif kind == "images" and isinstance(size, int):
            return FileView(data, False, size, self.about["shape"], normalise=scale, photo=True)
        elif kind == "images":  # small ones, not square, are taken as they are
            images = small_images([Path(item) for item in data.inputs], photo=True)
            if images is not None and list(images.shape[2:]) == sides:
                return MemoryView(replace(data, inputs=images), scale, device=device)
        expected = f"{kind} as it was trained on" + (f", of size {size}" if size else "")
        raise argument_error("data", expected, got, "pass such data")


def describe(
    model: ModelSettings, train: Labelled, data: Mapping[str, Any], head: nn.Linear
) -> dict[str, Any]:
    """What model.json says: the classes, the backbone, and how inputs reach it.

    data: where the training samples come from, and how they were read. head: that is evaluated.
    """
    size: int | list[int] = model.image_size
    inputs, shape, scale = "images", "crop", IMAGENET
    if isinstance(train.inputs, Tensor):
        inputs = "features" if train.inputs.is_floating_point() else "images"
        sides = list(train.inputs.shape[2:]) or [train.inputs.shape[1]]  # H, W; or A of features
        size = sides[0] if len(set(sides)) == 1 else sides
        shape, scale = "whole", CIFAR10 if sides[-1] <= 64 else IMAGENET
    elif isinstance(train.inputs[0], str):
        inputs, size = "texts", 0
    if model.normalise:
        scale = NORMALISATIONS[model.normalise]
    return {
        "iada": __version__,
        "classes": list(train.class_names),
        "model": asdict(model),
        "inputs": inputs,
        "size": size,
        "shape": shape,
        "normalise": scale,
        "cosine": isinstance(head, CosineLinear),
        "data": dict(data),
        "samples": fingerprint(training_samples(data)),
    }


def training_samples(data: Mapping[str, Any]) -> Labelled:
    """The training part of such `data` as model.json has it; image files as their paths."""
    others = ("path", "reader", "memory", "check")
    options = {name: data[name] for name in data if name not in others}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown when it was read for training
        return read_own(data["path"], **options, memory=False, check=False)["train"]


def build_model(
    model: ModelSettings, num_classes: int, width: int | None = None
) -> tuple[nn.Module, nn.Linear]:
    """Backbone and head; for features (N, width) the backbone is "identity" or a small "mlp"."""
    if (model.backbone in ("identity", "mlp")) != (width is not None):
        got = "others" if width is None else f"features of width {width}"
        remedy = "pass 'identity' or 'mlp' for features, and another backbone for all else"
        raise argument_error("model.backbone", f"inputs for {model.backbone!r}", got, remedy)
    if width is not None:
        if model.backbone == "mlp":
            return mlp(width, HIDDEN, num_classes)
        return nn.Identity(), nn.Linear(width, num_classes)
    if model.frozen and not (model.pretrained or model.weights):
        remedy = "pass --set model.weights=FILE, or model.frozen=false"
        raise argument_error("model.weights", "a file, as the backbone is frozen", "none", remedy)
    backbone, head = build_backbone(
        model.backbone,
        num_classes,
        pretrained=model.pretrained,
        weights=model.weights if model.pretrained else "",
        image_size=model.image_size,
    )
    if model.weights and not model.pretrained:
        load_weights(backbone, head, model.weights)
    if model.frozen:
        backbone.requires_grad_(False)
        for child in backbone.children():  # the trainer leaves parts in evaluation mode so
            child.eval()
    return backbone, head


def feature_width(data: Labelled) -> int | None:
    """A of features (N, A); None of other inputs."""
    inputs = data.inputs
    return inputs.shape[1] if isinstance(inputs, Tensor) and inputs.is_floating_point() else None


def write_samples(path: Path, split: Split, final: Outputs, log: SampleLog) -> None:
    """samples.csv: what training says of each training sample, a line each, in their order.

    row: within the training part, once others are held out. path: where a person finds it.
    prediction and probability: of the last epoch's classifier, which was trained on it. epsilon:
    the mean late in training. loss: the mean over training. Empty where it is not known.
    """
    train, rows = split.train, split.rows["train"].tolist()
    probability, prediction = final.logits.float().softmax(dim=1).max(dim=1)
    nothing = [float("nan")] * len(train)
    epsilon, loss = (
        nothing if values is None else values.tolist()
        for values in (log.mean_epsilon(), log.mean_loss())
    )
    lines: list[Sequence[Any]] = [SAMPLE_COLUMNS]
    names = train.class_names
    for i, row in enumerate(rows):
        known = [names[train.labels[i]], names[prediction[i]], f"{probability[i]:.6f}"]
        numbers = ["" if value != value else f"{value:.9g}" for value in (epsilon[i], loss[i])]
        lines.append([row, train.place(i), *known, *numbers])
    write_text(path, csv_text(lines))


def save_weights(
    path: Path, backbone: nn.Module, head: nn.Linear, epoch: int, judged: Mapping[str, float]
) -> None:
    """Weights alone, all or nothing. epoch: after which. judged: what they were chosen by."""
    state = {"backbone": backbone.state_dict(), "head": _head_state(head)}
    with atomic_write(path) as file:
        torch.save({**state, "epoch": epoch, "judged": dict(judged)}, file)


def load_trained(path: Path, which: str = "best") -> TrainedModel:
    """The classifier of a run's folder, or of an exported .safetensors file.

    A folder of one run below it stands for that run. Raises ValueError, or OSError, naming what
    is missing.
    """
    if path.is_file():
        about, state = _from_safetensors(path)
    else:
        folder = run_folder(path)
        about = read_json(folder / DESCRIPTION)
        file = folder / (BEST if which == "best" else CHECKPOINT)
        if not file.exists():
            raise argument_error(folder, file.name, "none", "let the run end one epoch")
        saved = load_plain(file, "weights that a run wrote", "let the run go on, or train again")
        state = {"backbone": saved["backbone"], "head": saved["head"]}
        about |= {"epoch": saved["epoch"]}
    settings = ModelSettings(**about["model"])
    settings = replace(settings, pretrained=False, weights="", frozen=False)
    width = about["size"] if about["inputs"] == "features" else None
    backbone, head = build_model(settings, len(about["classes"]), width)
    try:
        backbone.load_state_dict(state["backbone"])
        head.load_state_dict({"bias": torch.zeros_like(head.bias), **state["head"]})
    except RuntimeError as error:
        got = str(error).splitlines()[-1].strip()
        raise argument_error(path, "weights of its model", got, "export it again") from error
    return TrainedModel(backbone, CosineLinear(head) if about.get("cosine") else head, about)


def run_folder(path: Path) -> Path:
    """The folder of the run at a path: itself, or the one run below it."""
    if (path / DESCRIPTION).exists():
        return path
    runs = sorted(file.parent for file in path.rglob(DESCRIPTION)) if path.is_dir() else []
    if len(runs) == 1:
        return runs[0]
    expected = "a folder that `python -m iada train --data` wrote"
    if runs:
        remedy = f"pass one, as {runs[0]}"
        raise argument_error(path, f"{expected}, of one run", f"{len(runs)} runs", remedy)
    raise argument_error(path, expected, "no model.json in it", "pass the --out of a run")


def export(model: TrainedModel, path: Path) -> None:
    """One .safetensors file: tensors backbone.* and head.*, model.json's text in its metadata."""
    library = required("safetensors.torch", NO_SAFETENSORS)
    parts = {"backbone": model.backbone.state_dict(), "head": _head_state(model.head)}
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    with atomic_write(path) as file:
        file.write(library.save(tensors, {"iada": json.dumps(model.about)}))


def _from_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    library = required("safetensors.torch", NO_SAFETENSORS)
    try:
        content = path.read_bytes()
        tensors = library.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["iada"])
    except (required("safetensors", NO_SAFETENSORS).SafetensorError, KeyError, ValueError) as error:
        remedy = "export it again, or pass a run's folder"
        raise argument_error(path, "what `python -m iada export` wrote", error, remedy) from error
    state: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        state[part][rest] = tensor
    return about, state


def _head_state(head: nn.Linear) -> dict[str, Tensor]:
    """weight, and bias where it has one."""
    return {name: value for name, value in head.state_dict().items() if value is not None}
