"""`python -m iada predict` and `export`: what a model of your own data is used for."""

import argparse
from pathlib import Path

from iada.experiments.command import add_machine, device_named
from iada.experiments.datasets.own import check_images, read_arrays, read_unlabelled
from iada.experiments.model_file import WHICH, export, load_trained
from iada.utils.files import check_writable, csv_text, write_text


def add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser's."""
    inputs = "a folder, an image, a list; or an .npz with `inputs`, as the model was trained on"
    run = "the --out of a train --data, a run in it, or an exported file"
    which = (
        "weights of the epoch that is best on the samples held out, whose labels may be wrong too, "
        "or of the last one (default best)"
    )
    parser = commands.add_parser(
        "predict",
        help="classify photos by a trained model",
        description="A line `path,class,probability` of CSV for each input, on stdout or in --out.",
    )
    parser.add_argument("model", metavar="RUN", type=Path, help=run)
    parser.add_argument("inputs", metavar="PHOTOS", type=Path, help=inputs)
    parser.add_argument("--which", choices=WHICH, default="best", help=which)
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    add_machine(parser)
    parser.set_defaults(run=predict)
    parser = commands.add_parser("export", help="a trained model as one .safetensors file")
    parser.add_argument("model", metavar="RUN", type=Path, help=run)
    parser.add_argument("out", metavar="FILE", type=Path, help="the .safetensors to write")
    parser.add_argument("--which", choices=WHICH, default="best", help=which)
    parser.set_defaults(run=export_model)


def predict(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    model = load_trained(options.model, options.which)
    if options.inputs.suffix.lower() == ".npz":
        data = read_arrays(options.inputs)
        names = [f"row {row}" for row in range(len(data))]
    else:
        data = read_unlabelled(options.inputs)
        check_images(data.inputs)  # type: ignore[arg-type]
        names = list(map(str, data.inputs))
    logits = model.outputs(data, device_named(options.device), options.workers).logits
    probability, chosen = logits.float().softmax(dim=1).max(dim=1)
    classes = model.about["classes"]
    rows = [
        (name, classes[c], f"{p:.4f}")
        for name, c, p in zip(names, chosen.tolist(), probability.tolist(), strict=True)
    ]
    text = csv_text([("path", "class", "probability"), *rows])
    if options.out is None:
        print(text, end="")
        return 0
    check_writable(options.out.parent)
    write_text(options.out, text)
    print(f"written: {options.out}, {len(rows)} lines")
    return 0


def export_model(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    model = load_trained(options.model, options.which)
    check_writable(options.out.parent)
    export(model, options.out)
    print(f"written: {options.out}, the model of epoch {model.about['epoch']}")
    return 0
