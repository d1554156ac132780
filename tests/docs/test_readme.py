"""The examples of the README and the docs run as they stand."""

import json
import re
from pathlib import Path

import pytest
import torch

import iada
from iada.cli import SECTIONS, main
from iada.training.schedule import build_optimizer, build_schedule
from iada.utils.settings import read_toml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_examples():
    torch.manual_seed(0)
    swap, validate, meta = blocks("python")
    batches = [(torch.randn(8, 20), torch.arange(8)), (torch.randn(8, 20), torch.arange(8) + 2)]
    backbone = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU())
    names = {
        "make_backbone": lambda: backbone,
        "train_labels": torch.arange(100) % 10,
        "loader": batches,
        "validation_loader": batches,
        "meta_loader": batches[:1],  # shorter than the loader
        "optimizer": torch.optim.SGD(backbone.parameters(), lr=0.1),
    }
    exec(swap, names)
    assert int(names["criterion"].covariance.count.sum()) == 16
    assert torch.isfinite(names["loss"])
    exec(validate, names)
    assert int(names["criterion"].covariance.count.sum()) == 16
    assert backbone.training
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    plain = torch.nn.functional.cross_entropy(names["head"](backbone(images)), labels)
    assert float(names["validation_loss"]) == pytest.approx(float(plain.detach()))
    names["optimizer"].add_param_group({"params": [*names["head"].parameters()]})
    exec(meta, names)
    assert int(names["meta"].covariance.count.sum()) == 16
    assert len(swap.strip().splitlines()) <= 15


def test_toml_example(tmp_path):
    (example,) = blocks("toml")
    path = tmp_path / "run.toml"
    path.write_text(example)
    assert read_toml(path, SECTIONS)["trainer"].ce_epochs == 10


def test_settings_of_the_training_page(tmp_path):
    (example,) = blocks("toml", (ROOT / "docs" / "training.md").read_text())
    path = tmp_path / "run.toml"
    path.write_text(example)
    config = read_toml(path, SECTIONS)["trainer"]
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    assert type(optimizer) is torch.optim.AdamW
    build_schedule(optimizer, config, steps=10)


def test_three_commands_for_your_own_photos(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("jinja2")
    for name in ("cat", "dog"):
        (tmp_path / "PHOTOS" / name).mkdir(parents=True)
        for place in range(8):
            picture = image.new("RGB", (8, 8), (30 * place, 0, 0))
            picture.save(tmp_path / "PHOTOS" / name / f"{place}.png")
    section = README.split("## On your own photos")[1].split("\n## ")[0]
    commands = re.findall(r"^    python -m iada ([^#>\n]*)", section, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "labels", "predict"]
    monkeypatch.chdir(tmp_path)
    quick = "--backbone resnet8 --epochs 2 --meta-per-class 2 --device cpu"
    for command in commands:
        words = command.replace("NEW-PHOTOS", "PHOTOS").split()
        assert main([*words, *(quick.split() if words[0] == "train" else ())]) == 0
    assert "PHOTOS/cat/0.png,dog" in (out := capsys.readouterr().out) or "0.png,cat" in out
    assert (tmp_path / "runs/photos/index.html").exists()
    assert (tmp_path / "runs/photos/labels.html").exists()


def test_your_own_data_and_backbones(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for place in range(count):
                image.new("RGB", (8, 8), (30 * place, 0, 0)).save(
                    tmp_path / part / name / f"{place}.png"
                )
    names = {
        "photos": tmp_path,
        "config": iada.TrainerConfig(epochs=2, ce_epochs=1, batch_size=4, meta_batch_size=4),
        "model": torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)),
        "example_batch": torch.zeros(1, 3),
    }
    (block,) = blocks("python", (ROOT / "docs/experiments.md").read_text())
    exec(block, names)
    assert len(names["trainer"].history) == 2
    assert names["head"].in_features == 5


def test_what_the_rate_does_on_the_digits_is_as_recorded():
    """Top-1 by method and what was set, over eight seeds."""
    figures = {}
    for record in json.loads((ROOT / "bench" / "results" / "digits-rate.json").read_text()):
        constant = any("constant" in change for change in record["deviations"])
        rate = "trainer.gamma=0.01" in record["deviations"]
        name = "constant" if constant and record["method"] == "meta-iada" else record["method"]
        figures.setdefault((name, rate), {})[record["seed"]] = 100 * record["last"]["top1"]
    means = {key: sum(runs.values()) / len(runs) for key, runs in figures.items()}
    assert {len(runs) for runs in figures.values()} == {8}
    found = re.search(
        r"deferred Logit Adjustment ends at ([\d.]+), .* ε = ([\d.]+) at ([\d.]+), Meta-IADA at "
        r"([\d.]+)\n",
        README,
    )
    arms = [("deferred-la", True), ("constant", True), ("meta-iada", True)]
    shown = [float(found[place]) for place in (1, 3, 4)]
    assert shown == pytest.approx([means[arm] for arm in arms], abs=0.051)
    text = (ROOT / "iada/experiments/recipes/digits/long-tail.toml").read_text()
    lost = means["deferred-la", False] - means["deferred-la", True]
    assert "loses two points" in text
    assert round(lost) == 2
    assert "that ε costs 0.8" in text
    assert f"{means['deferred-la', False] - means['constant', False]:.1f}" == "0.8"
    half = (means["constant", True] - means["deferred-la", True]) / lost
    assert 0.4 < half < 0.65
