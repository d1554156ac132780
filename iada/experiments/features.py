"""`python -m iada features`: a data set's features by a backbone, for training heads alone."""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from iada.experiments import recipe as recipes
from iada.experiments.command import add_machine, device_named
from iada.experiments.datasets.features import write_features
from iada.experiments.experiment import Limits, make_view, read_parts
from iada.experiments.model_file import build_model
from iada.utils.checks import argument_error
from iada.utils.evaluate import outputs
from iada.utils.files import check_writable


def add_features(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "features",
        help="a data set's features by a backbone, for training heads alone",
        description="Compute the features of every image of a recipe's data set by its backbone, "
        "in evaluation mode and without augmentation, and keep them in one .npz. Then: "
        "python -m iada paper --table frozen --row ROW --data FILE",
    )
    parser.add_argument(
        "--recipe", required=True, help="whose data and model, as table2/cifar10-100"
    )
    parser.add_argument("--data", type=Path, help="your copy of the data set")
    parser.add_argument(
        "--weights", help="a file of the backbone's weights: iada.models.load_weights"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", dest="changes")
    parser.add_argument("--train-limit", type=int, default=0, help="training images a class")
    parser.add_argument("--test-limit", type=int, default=0, help="test images a class")
    add_machine(parser)
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.set_defaults(run=features)


def features(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    recipe = recipes.load(options.recipe, recipes.changes_of(options.changes))
    model = recipe.model
    if options.weights is not None:
        model = replace(model, weights=options.weights, pretrained=False)
    if not (model.weights or model.pretrained):
        expected = "a file of the backbone's weights"
        raise argument_error("--weights", expected, "none", "or pass --set model.pretrained=true")
    check_writable(options.out.parent)
    limits = Limits(train=options.train_limit, test=options.test_limit)
    parts = read_parts(recipe, options.data, limits)
    device = device_named(options.device)
    backbone, head = build_model(model, parts["train"].num_classes)
    backbone, head = backbone.to(device), head.to(device)
    computed = {}
    for name, part in parts.items():
        view = make_view(recipe, part, device)
        evaluated = outputs(backbone, head, view, num_workers=options.workers)
        computed[name] = replace(part, inputs=evaluated.features.float().reshape(len(part), -1))
        accuracy = float((evaluated.logits.argmax(dim=1) == part.labels).double().mean())
        print(f"{name}: {tuple(computed[name].inputs.shape)}, its own head {100 * accuracy:.1f} %")  # type: ignore[union-attr]
    about = {"recipe": recipe.name, "changes": options.changes, "model": model.as_record()}
    write_features(options.out, computed, {**about, "backbone": weights_digest(backbone)})
    print(f"written: {options.out}")
    return 0


def weights_digest(model: nn.Module) -> str:
    """32 hexadecimal digits of all parameters and buffers."""
    state: Any = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
