"""The command line as a person uses it, and what importing costs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from iada import cli
from iada.cli import main
from iada.utils.workers import LostWorkers

SETTINGS = """
[data]
kind = "npz"
path = "data.npz"

[model]
hidden = [16]

[trainer]
epochs = {epochs}
ce_epochs = 1
batch_size = 16
lr = 0.1
clip_norm = 0.0
schedule = "constant"
"""


@pytest.fixture
def config(tmp_path):
    """A configuration beside its data."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 48), ("meta", 12), ("validation", 12), ("test", 30)):
        labels = np.arange(count) % 3
        arrays[f"{part}_inputs"] = generator.normal(size=(count, 2, 4)) + 3 * labels[:, None, None]
        arrays[f"{part}_labels"] = labels
    np.savez(tmp_path / "data.npz", **arrays)
    path = tmp_path / "config.toml"
    path.write_text(SETTINGS.format(epochs=6))
    return path


def test_import_is_light():
    code = (
        "import sys, iada; "
        "heavy = {'triton', 'matplotlib', 'sklearn', 'iada.experiments'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [[], ["demo"], ["train"], ["paper"]])
def test_help_everywhere(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m iada" in text
    if arguments == ["train"]:
        assert "covariance_lr" in text
        assert "_inputs" in text


def test_train_writes_its_result(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(config), "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["test_balanced_accuracy"] > 0.9
    assert len(result["history"]) == 6
    assert "balanced test accuracy" in capsys.readouterr().out
    assert main(["train", "--config", str(config), "--out", str(out)]) == 2
    assert "add --resume" in capsys.readouterr().err


def test_train_takes_changes_of_its_configuration(config, tmp_path, capsys):
    words = ["train", "--config", str(config), "--out", str(tmp_path / "run"), "--set"]
    assert main([*words, "trainer.epochs=2", "trainer.lr=0.05"]) == 0
    settings = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    assert (settings["epochs"], settings["lr"]) == (2, 0.05)
    assert main([*words, "trainer.lrr=1"]) == 2
    assert "lrr: expected one of" in capsys.readouterr().err


def test_ctrl_c_leaves_a_resumable_checkpoint(config, tmp_path):
    steady = SETTINGS.replace("clip_norm = 0.0", "clip_norm = 0.1")  # 4000 epochs do not diverge
    config.write_text(steady.format(epochs=4000))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "iada", "train", "--config", str(config), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at epoch" in text
    assert f"resume from {out}: the same command with --resume goes on" in text
    epoch = torch.load(out / "checkpoint.pt", weights_only=True)["epoch"]
    config.write_text(steady.format(epochs=epoch + 1))
    assert main(["train", "--config", str(config), "--out", str(out), "--resume"]) == 0
    assert len(json.loads((out / "result.json").read_text())["history"]) == epoch + 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("lr =", "learning_rate =", r"\[trainer\] learning_rate: expected one of method, epochs"),
        ("[model]", "[net]", r"\[net\]: expected \[data\], \[model\], \[trainer\]"),
        ("lr = 0.1", "lr = ", "expected TOML"),
        ("lr = 0.1", 'lr = "x"', r"\[trainer\] lr: expected a value of type float, got 'x'"),
        ("[16]", '"abc"', r"\[model\] hidden: expected a list of integers, got 'abc'"),
        ("[16]", "[-2]", r"\[model\] hidden: expected widths from 1"),
        ("[16]", '[16]\ndevice = "gpu"', r"\[model\] device: expected a torch device, got 'gpu'"),
        ("lr = 0.1", "lr = nan", r"\[trainer\] lr: expected a finite number, got nan"),
        (
            "clip_norm = 0.0",
            "clip_norm = -1",
            r"\[trainer\] clip_norm: expected at least 0, got -1",
        ),
        (
            "ce_epochs = 1",
            "ce_epochs = 7",
            r"ce_epochs: expected at most epochs=6, got 7; set it too",
        ),
        ('"npz"', '"zip"', r"\[data\] kind: expected one of 'digits', 'npz', got 'zip'"),
        (
            'kind = "npz"',
            'kind = "digits"\nscenario = "tail"',
            r"\[data\] scenario: expected one of 'long-tail', 'noise', got 'tail'",
        ),
        ("data.npz", "none.npz", r"\[data\] path: expected an .npz file"),
        ("data.npz", "config.toml", r"\[data\] path: expected an .npz file"),
    ],
)
def test_configuration_errors_name_the_place(config, tmp_path, capsys, before, after, message):
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, after))
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_npz_without_a_part_is_named(config, tmp_path, capsys):
    with np.load(tmp_path / "data.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != "test_labels"}
    np.savez(tmp_path / "data.npz", **kept)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "no test_labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("test_inputs", np.zeros((30, 3)), "samples of shape"),
        ("train_inputs", np.full((48, 2, 4), np.nan), "finite numbers"),
        ("train_inputs", np.array(["a"] * 48), "finite numbers"),
        ("meta_labels", np.full(12, -1), "class indices"),
        ("meta_labels", np.zeros(12), "class indices"),
        ("validation_labels", np.zeros(5, dtype=int), "as many labels as inputs"),
        ("train_groups", np.zeros(48), "a group from 0"),
        ("train_groups", np.zeros(47, dtype=int), "a group from 0"),
    ],
)
def test_damaged_arrays_are_named(config, tmp_path, capsys, name, value, message):
    with np.load(tmp_path / "data.npz") as arrays:
        kept = dict(arrays)
    np.savez(tmp_path / "data.npz", **{**kept, name: value})
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert name.split("_")[0] in text


def test_methods_of_groups_train_on_an_npz_with_groups(config, tmp_path, capsys):
    words = ["train", "--config", str(config), "--set", "trainer.method=group-dro"]
    assert main([*words, "--out", str(tmp_path / "without")]) == 2
    error = capsys.readouterr().err
    assert "train_set: expected an attribute `groups`" in error
    assert "train_groups" in error
    with np.load(tmp_path / "data.npz") as arrays:
        kept = dict(arrays)
    np.savez(tmp_path / "data.npz", **kept, train_groups=np.arange(48, dtype=np.uint8) % 2)
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    losses = [row["loss"] for row in result["history"]]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]


def test_an_unwritable_folder_is_found_before_training(config, tmp_path, capsys):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert main(["train", "--config", str(config), "--out", str(blocked)]) == 2
    assert "folder: expected" in capsys.readouterr().err


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, capsys):
    def missing(message):
        def command(options):
            raise ModuleNotFoundError(message, name="matplotlib")

        return command

    monkeypatch.setattr("iada.experiments.command.paper", missing("No module named 'matplotlib'"))
    assert main(["paper", "--list"]) == 2
    assert "pip install 'iada[paper]'" in capsys.readouterr().err
    monkeypatch.setattr("iada.experiments.command.paper", missing("no timm; pip install timm"))
    assert main(["paper", "--list"]) == 2
    assert capsys.readouterr().err == "error: no timm; pip install timm\n"


def test_a_worker_that_was_killed_is_an_error_and_no_traceback(monkeypatch, capsys):
    def stub(options):
        raise LostWorkers("data: expected the loader's workers to live, got one that ended")

    monkeypatch.setattr(cli, "_train", stub)
    assert cli.main(["train", "--config", "run.toml"]) == 2
    assert capsys.readouterr().err == (
        "error: data: expected the loader's workers to live, got one that ended\n"
    )
