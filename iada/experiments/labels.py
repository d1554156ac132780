"""`python -m iada labels`: the samples whose labels a trained run believes least."""

import argparse
import csv
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iada.experiments.command import check_at_least
from iada.experiments.datasets import Labelled
from iada.experiments.datasets.images import data_address, open_image
from iada.experiments.model_file import DESCRIPTION, SAMPLES, run_folder, training_samples
from iada.experiments.own_data import (
    EITHER_WAY,
    RANKING,
    add_own_data,
    check_none_given,
    labels_run,
    own_recipe,
    train_methods,
)
from iada.experiments.records import read_json
from iada.experiments.report.template import fill
from iada.experiments.scenarios.split import fingerprint, other_parts
from iada.training.label_issues import LabelIssues, label_issues
from iada.utils.checks import argument_error
from iada.utils.files import csv_text, write_text
from iada_kernels.version import __version__

LABELS, PAGE = "labels.csv", "labels.html"
COLUMNS = ("rank", "score", "path", "label", "prediction", "probability", "epsilon", "loss")
BY = ("both", "epsilon", "loss")
OTHER_DATA = "leave them out, or pass data to train on, and another --out"
THUMBNAIL = 160  # pixels a side at most


def add_labels(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "labels",
        help="the samples that are most likely mislabelled",
        description=f"Rank the training samples by how little their labels are believed: "
        f"{LABELS}, and {PAGE} with the images of the first. RUN is the --out of a train --data by "
        "Meta-IADA, or a run in it; DATA is trained on first, by the options of train --data.",
    )
    parser.add_argument("source", metavar="RUN_OR_DATA", type=Path)
    parser.add_argument("--by", choices=BY, default="both", help="what ranks (default both)")
    parser.add_argument("--top", type=int, default=100, help="images on the page (default 100)")
    parser.add_argument("--out", type=Path, help="folder to write (default: the run's)")
    add_own_data(parser)
    parser.set_defaults(run=labels)


def labels(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    check_at_least(0, options, "top")
    source, folder = options.source, options.out
    if not source.exists():
        got, remedy = f"no run and no data at {source}", "pass where one of them lies"
        raise argument_error("RUN_OR_DATA", "a run, or data to train on", got, remedy)
    if source.is_file() or not any(source.rglob(DESCRIPTION)):
        folder = folder or Path("runs") / source.stem
        if folder.resolve() == source.resolve():
            remedy = "pass a run, or another --out if it is data"
            raise argument_error(source, "a run in it", f"no {DESCRIPTION}", remedy)
        run = _trained(options, source, folder)
        source = folder
    else:
        check_none_given(options, (*options.own_only, *EITHER_WAY), "a run", OTHER_DATA)
        run = _ranking_run(source)
    rows = read_samples(run / SAMPLES)
    issues = ranked(rows, options.by)
    data = _samples_of(run)
    listed = _listed(rows, issues, data)
    folder = folder or source
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / LABELS, listed)
    shown = [(line, _thumbnail(data, row)) for line, row in listed[: options.top]]
    differing = sum(line["prediction"] != line["label"] for line, _ in listed)
    page = render(source.name, shown, len(listed), differing, options.by)
    write_text(folder / PAGE, page)
    print(f"written: {folder / LABELS}, {len(listed)} samples, and {folder / PAGE}")
    return 0


def _trained(options: argparse.Namespace, data: Path, folder: Path) -> Path:
    """The run that ranks, after training on the data in `folder`."""
    options.data, options.out = data, folder
    recipe = own_recipe(options)
    run = labels_run(recipe, folder)
    if run is None:
        expected = f"one that ranks labels: {' or '.join(RANKING)}"
        remedy = "add meta-iada"
        raise argument_error("--method", expected, " ".join(e.key for e in recipe.methods), remedy)
    train_methods(recipe, options)
    return run


def _ranking_run(path: Path) -> Path:
    """The run at a path, or the one below it whose method ranks labels."""
    below = [] if (path / DESCRIPTION).exists() else sorted(path.rglob(DESCRIPTION))
    runs = [file.parent for file in below if read_json(file).get("method") in RANKING]
    if len(runs) > 1:
        expected, remedy = "a folder of one run that ranks labels", f"pass one, as {runs[0]}"
        raise argument_error(path, expected, f"{len(runs)} of them", remedy)
    return run_folder(runs[0] if runs else path)


def read_samples(path: Path) -> list[dict[str, str]]:
    """The lines of a run's samples.csv."""
    if not path.exists():
        remedy = "let the run end: python -m iada train --data … goes on where it stopped"
        raise argument_error(path, "what a finished run writes", "nothing", remedy)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ranked(rows: Sequence[dict[str, str]], by: str) -> LabelIssues:
    """The samples by ε, by loss or by both, as far as the run knows them."""
    known = {}
    for name in ("epsilon", "loss"):
        values = torch.tensor([float(row[name] or "nan") for row in rows], dtype=torch.float64)
        if by in (name, "both") and not values.isnan().all():
            known[name] = values
    if not known:
        got, remedy = "neither", "train with --method meta-iada"
        raise argument_error(SAMPLES, "the ε or the loss of each sample", got, remedy)
    return label_issues(**known)


def _samples_of(run: Path) -> Labelled:
    """The data set's training part; ValueError if it is not what the run was trained on."""
    about = read_json(run / DESCRIPTION)
    data = training_samples(about["data"])
    if other_parts({"train": about.get("samples", {})}, {"train": fingerprint(data)}):
        expected = f"the samples that {run} was trained on"
        remedy = "put the data back as it was, or train again"
        raise argument_error(about["data"]["path"], expected, "others", remedy)
    return data


def _listed(
    rows: Sequence[dict[str, str]], issues: LabelIssues, data: Labelled
) -> list[tuple[dict[str, Any], int]]:
    """(line of the CSV, row in the data), in the ranking's order."""
    listed = []
    for rank, index in enumerate(issues.indices.tolist(), 1):
        line, score = rows[index], float(issues.scores[index])
        row = int(line["row"])
        if row >= len(data) or data.class_names[int(data.labels[row])] != line["label"]:
            remedy = "put the data back as it was, or train again"
            raise argument_error(SAMPLES, "the data of the run", f"another sample {row}", remedy)
        known = {name: line[name] for name in COLUMNS if name in line}
        own = {"rank": rank, "score": score, "path": data.place(row)}
        if isinstance(data.inputs[row], str):
            own["text"] = data.inputs[row]
        listed.append(({**known, **own}, row))
    return listed


def _write_csv(path: Path, listed: Sequence[tuple[dict[str, Any], int]]) -> None:
    rows = ({**line, "score": f"{line['score']:.6f}"} for line, _ in listed)
    columns = [*COLUMNS, *["text"] * any("text" in line for line, _ in listed)]
    cells = [[row.get(name, "") for name in columns] for row in rows]
    write_text(path, csv_text([columns, *cells]))


def _thumbnail(data: Labelled, row: int) -> str:
    """A small image as a data address; empty for what is no image."""
    inputs: Any = data.inputs
    if isinstance(inputs, Tensor) and (inputs.dtype != torch.uint8 or inputs.dim() != 4):
        return ""
    if not isinstance(inputs, Tensor) and isinstance(inputs[row], str):
        return ""
    from PIL import Image

    if isinstance(inputs, Tensor):
        image = Image.fromarray(inputs[row].permute(1, 2, 0).contiguous().numpy())
    else:
        image = open_image(inputs[row], photo=True)
    return data_address(image, THUMBNAIL)


def render(
    title: str, shown: Sequence[tuple[dict[str, Any], str]], count: int, differing: int, by: str
) -> str:
    """The page. shown: (line of the CSV, image as an address, or "") of each sample."""
    return fill(
        "labels.html",
        title=title,
        shown=shown,
        count=count,
        differing=differing,
        by={"both": "ε and loss", "epsilon": "ε", "loss": "the loss over training"}[by],
        version=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
