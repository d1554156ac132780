"""`python -m bench.first_use`: what the README's examples come to, as they stand, seed by seed.

Its loss swapped into a plain loop, and its TOML file, are read from README.md and run on
scikit-learn's digits with a long tail of 20:1 and an MLP 64-128-64; beside each Logit Adjustment by
the same code. Balanced test accuracy in percent. A run that diverges ends with an error and counts
as 0. Seeds change the split, the initialisation and the order. `--json` writes
bench/results/first_use.json, with date, commit and machine.
"""

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iada.cli import main as iada_main
from iada.models.small import mlp
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline, source_commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "first_use.json"
CLASSES, LARGEST, RATIO, META, TEST = 10, 100, 20, 10, 50  # images of each class
EPOCHS, BATCH = 40, 32  # of the plain loop


def readme_block(language: str) -> str:
    """The first example in that language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def split(seed: int) -> dict[str, Tensor]:
    """{"train_inputs": (N, 64) in [0, 1], "train_labels": (N), "meta_inputs", …, "test_labels"}."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = np.random.default_rng(seed)
    rows: dict[str, list[int]] = {"test": [], "meta": [], "train": []}
    for c in range(CLASSES):
        own = generator.permutation(np.flatnonzero(digits.target == c))
        kept = int(LARGEST * (1 / RATIO) ** (c / (CLASSES - 1)) + 1e-9)
        ends = np.cumsum([TEST, META, kept])
        for part, chosen in zip(rows, np.split(own, ends), strict=False):
            rows[part] += chosen.tolist()
    inputs = torch.from_numpy(digits.data / 16.0).float()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    found = {f"{part}_inputs": inputs[chosen] for part, chosen in rows.items()}
    return found | {f"{part}_labels": labels[chosen] for part, chosen in rows.items()}


def swapped(method: str, seed: int, epochs: int = EPOCHS) -> float:
    """The README's loop; method "iada", or "logit-adjustment", the same at α = 0."""
    data, code = split(seed), readme_block("python")
    if method == "logit-adjustment":
        code, count = re.subn(r"alpha=0\.1", "alpha=0.0", code)
        assert count == 1
    torch.manual_seed(seed)
    backbone, _ = mlp(64, (128, 64), CLASSES)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    names: dict[str, Any] = {}

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        optimizer.param_groups[0]["params"] += names["head"].parameters()  # which is there by now
        for _ in range(epochs):
            for rows in torch.randperm(len(data["train_labels"])).split(BATCH):
                yield data["train_inputs"][rows], data["train_labels"][rows]

    names |= {"make_backbone": lambda: backbone, "train_labels": data["train_labels"]}
    names |= {"optimizer": optimizer, "loader": loader()}
    try:
        exec(code, names)
    except (ValueError, FloatingPointError):
        return 0.0
    with torch.no_grad():
        found = names["head"](backbone(data["test_inputs"])).argmax(dim=1)
    return balanced(found, data["test_labels"])


def configured(method: str, seed: int, epochs: int | None = None) -> float:
    """The README's TOML file under `python -m iada train`, with this method and seed."""
    text, count = re.subn(
        'method = ".*"', f'method = "{method}"\nseed = {seed}', readme_block("toml")
    )
    assert count == 1
    if method != "meta-iada":
        text = re.sub("ce_epochs = .*", "", text)
    if epochs is not None:
        text = re.sub(r"(?m)^epochs = .*", f"epochs = {epochs}", text)
    with tempfile.TemporaryDirectory() as folder:
        arrays: dict[str, Any] = {name: part.numpy() for name, part in split(seed).items()}
        np.savez(Path(folder) / "data.npz", **arrays)
        config, out = Path(folder) / "run.toml", Path(folder) / "run"
        config.write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = iada_main(["train", "--config", str(config), "--out", str(out)])
        if code:
            return 0.0
        return 100 * json.loads((out / "result.json").read_text())["test_balanced_accuracy"]


def balanced(found: Tensor, labels: Tensor) -> float:
    """The mean over classes of accuracy, in percent."""
    right = (found == labels).double()
    return 100 * statistics.mean(float(right[labels == c].mean()) for c in range(CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="FILE",
        help=f"write the figures (to {RESULTS.relative_to(ROOT)})",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    print(headline(machine, {"backend": machine["backend"]}) + "\n", flush=True)
    table: dict[str, list[float]] = {}
    for name, run, own in (("swap", swapped, "iada"), ("toml", configured, "meta-iada")):
        for method in (own, "logit-adjustment"):
            values = [round(run(method, seed), 2) for seed in range(options.seeds)]
            table[f"{name} {method}"] = values
            mean = statistics.mean(values)
            print(
                f"{name:5}{method:18}", *(f"{v:6.1f}" for v in values), f"| {mean:.2f}", flush=True
            )
    if options.json:
        record: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
        if commit := source_commit():
            record["commit"] = commit
        record |= {"machine": machine, "balanced_accuracy": table}
        write_text(options.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
