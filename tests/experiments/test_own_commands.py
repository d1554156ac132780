"""One command after another on data of one's own: what is given is used, what is printed works."""

import csv
import json
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from iada.cli import main
from iada.experiments import command as command_module
from iada.experiments.datasets.own import read_own
from iada.experiments.metrics import measure
from iada.experiments.model_file import load_trained
from iada.experiments.run import run
from iada.experiments.watch import Watch

pytest.importorskip("PIL.Image")
CLASSES = ("cat", "dog", "owl")
QUICK = ["--epochs", "2", "--device", "cpu", "--set", "trainer.batch_size=8"]
QUICK += ["trainer.meta_batch_size=6", "trainer.ce_epochs=1"]


def arrays(count, seed=0):
    """Features that tell their class."""
    labels = np.arange(count) % 3
    noise = np.random.default_rng(seed).normal(size=(count, 5))
    return {"inputs": (noise + 3 * labels[:, None]).astype(np.float32), "labels": labels}


def write_arrays(path, **parts):
    """An .npz of these parts, each as `arrays` has it."""
    np.savez(path, **{f"{part}_{k}": v for part, held in parts.items() for k, v in held.items()})
    return path


def write_photos(root, count):
    """A folder for each class, each of its own brightness."""
    from PIL import Image

    rng = np.random.default_rng(count)
    for place, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = (rng.integers(0, 30, (8, 8, 3)) + 100 * place).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def features(tmp_path):
    """Training features without any other part."""
    return write_arrays(tmp_path / "f.npz", train=arrays(30))


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def train(data, out, *words):
    return main(["train", "--data", str(data), "--out", str(out), *words, *QUICK])


def counts_of(out, method="meta-iada"):
    record = json.loads((out / method / "seed0" / "record.json").read_text())
    return {part: sum(count) for part, count in record["split"]["class_counts"].items()}


def ranked(folder):
    return len(lines_of(folder / "labels.csv"))


def test_a_meta_set_of_photos_that_is_given(tmp_path, monkeypatch, capsys):
    for name, count in (("photos", 4), ("clean", 2), ("later", 3)):
        write_photos(tmp_path / name, count)
    monkeypatch.chdir(tmp_path)
    words = ["--backbone", "resnet8", "--image-size", "8"]
    words += ["--meta", "clean", "--test", "later"]
    assert train("photos", tmp_path / "run", *words) == 0
    assert counts_of(tmp_path / "run") == {"train": 9, "meta": 6, "validation": 3, "test": 9}
    assert "on the test set at the last epoch" in capsys.readouterr().out
    page = (tmp_path / "run" / "index.html").read_text()
    assert "Test accuracy of each class" in page
    assert "no test set" not in page
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run knows where its parts lie
    assert main(["labels", str(tmp_path / "run")]) == 0
    assert ranked(tmp_path / "run") == 9


@pytest.mark.parametrize("inside", [True, False])
def test_a_meta_set_of_features_that_is_given(tmp_path, inside, capsys):
    pieces = {"train": arrays(30), "test": arrays(9, 1)}
    given = {"meta": arrays(6, 2)}
    data = write_arrays(tmp_path / "f.npz", **pieces, **(given if inside else {}))
    words = [] if inside else ["--meta", str(write_arrays(tmp_path / "m.npz", train=arrays(6, 2)))]
    out = tmp_path / "run"
    assert train(data, out, *words, "--method", "ce", "meta-iada") == 0
    sizes = {"train": 24, "validation": 6, "test": 9, "meta": 6}  # none out of the training samples
    assert counts_of(out) == sizes
    assert counts_of(out, "ce") == sizes
    assert "train + meta" not in (out / "index.html").read_text()
    assert main(["labels", str(out / "meta-iada" / "seed0")]) == 0
    assert ranked(out / "meta-iada" / "seed0") == 24
    assert train(data, tmp_path / "other", *words, "--meta-per-class", "2") == 2
    printed = capsys.readouterr()
    assert "--meta" in printed.err
    assert "no use of" not in printed.out
    assert train(data, tmp_path / "plain", *words, "--method", "ce") == 0
    assert "6 for meta (which CE makes no use of)" in capsys.readouterr().out


def test_a_recipe_changes_one_setting_of_a_method(features, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text(
        "[methods.meta-iada]\nalpha = 0.2\n[methods.weaker]\nmethod = 'meta-iada'\nalpha = 0.01\n"
    )
    out = tmp_path / "run"
    words = ["--recipe", str(file), "--meta-per-class", "2", "--method", "meta-iada", "weaker"]
    assert train(features, out, *words) == 0
    for method, alpha, title in (("meta-iada", 0.2, "Meta-IADA"), ("weaker", 0.01, "weaker")):
        record = json.loads((out / method / "seed0" / "record.json").read_text())
        assert (record["settings"]["alpha"], record["method_name"]) == (alpha, title)
    file.write_text("[methods]\nce = 3\n")
    assert train(features, tmp_path / "no", *words) == 2
    assert "write [methods.ce]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["--method", "ce", "meta-iada", "--meta-per-class", "2"], ["labels", "predict", "export"]),
        (["--seeds", "2", "--meta-per-class", "2"], ["labels", "predict", "export"]),
        (["--method", "isda"], ["predict", "export"]),
    ],
)
def test_the_printed_commands_work(features, tmp_path, capsys, words, kinds):
    pytest.importorskip("safetensors")
    assert train(features, tmp_path / "a run", *words) == 0
    text = capsys.readouterr().out
    lines = text[text.index("Next:") :].splitlines()[1:]
    names = {"NEW.npz": str(features), "MODEL.safetensors": str(tmp_path / "m.safetensors")}
    commands = [[names.get(word, word) for word in shlex.split(line)] for line in lines]
    assert [command[:3] for command in commands] == [["python", "-m", "iada"]] * len(kinds)
    assert [command[3] for command in commands] == kinds
    for command in commands:
        assert main(command[3:]) == 0


@pytest.mark.parametrize("command", ["train", "labels"])
def test_what_a_stopped_command_says_goes_on(features, tmp_path, capsys, monkeypatch, command):
    out = tmp_path / "a run"
    words = [command, *["--data"] * (command == "train"), str(features), "--out", str(out)]
    words += ["--meta-per-class", "2", *QUICK]
    observe, visits = Watch.__call__, []

    def stopped_once(*parts):
        observe(*parts)
        visits.append(parts)
        if len(visits) == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watch, "__call__", stopped_once)
    assert main(words) == 130
    text = capsys.readouterr().out
    assert f"stopped at epoch 1; the same command goes on, with --out '{out}'" in text
    run = out / "meta-iada" / "seed0"
    assert main([*words, "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"--out: expected a folder for runs, got {run}, which is a run's; pass the" in error
    assert not (run / "meta-iada").exists()
    steps = len(visits)
    assert main(words) == 0
    assert len(visits) - steps == 2 * 3 - 4  # of three steps an epoch


def test_labels_trains_first_and_takes_the_run_that_ranks(features, tmp_path, capsys):
    words = ["--out", str(tmp_path / "run"), "--meta-per-class", "2", *QUICK]
    assert main(["labels", str(features), *words, "--method", "ce", "meta-iada"]) == 0
    assert ranked(tmp_path / "run") == 18
    assert main(["labels", str(features), "--out", str(tmp_path / "no"), "--method", "isda"]) == 2
    assert "--method: expected one that ranks labels" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()  # found before training
    assert main(["labels", str(tmp_path / "run")]) == 0  # the one of two runs that ranks
    words += ["--method", "ce", "meta-iada", "--seeds", "2"]
    assert main(["train", "--data", str(features), *words]) == 0
    run = str(tmp_path / "run" / "meta-iada" / "seed0")
    capsys.readouterr()
    assert main(["labels", str(tmp_path / "run")]) == 2
    assert f"got 2 of them; pass one, as {run}" in capsys.readouterr().err
    assert main(["labels", run, "--epochs", "9", "--set", "trainer.lr=1"]) == 2
    assert "--epochs, --set: expected options of training" in capsys.readouterr().err


@pytest.mark.parametrize("array", ["inputs", "train_inputs"])
def test_labels_names_rows_of_what_was_passed(tmp_path, array):
    given = arrays(60)
    order = np.random.default_rng(0).permutation(60)  # a row's class does not tell its number
    given = {name: values[order] for name, values in given.items()}
    data, out = tmp_path / "f.npz", tmp_path / "run"
    np.savez(data, **{array: given["inputs"], array.replace("inputs", "labels"): given["labels"]})
    words = ["--out", str(out), "--meta-per-class", "3", "--test", "0.2", *QUICK]
    assert main(["labels", str(data), *words]) == 0
    place = re.compile(rf"{array}\[(\d+)\]")
    for file in (out / "labels.csv", out / "meta-iada" / "seed0" / "samples.csv"):
        rows = {
            int(place.fullmatch(line["path"])[1]): int(line["label"]) for line in lines_of(file)
        }
        assert len(rows) == 60 - 12 - 9 - 9  # tested on, held out and clean
        assert all(given["labels"][row] == label for row, label in rows.items())
    shown = place.findall((out / "labels.html").read_text())
    assert set(map(int, shown)) == set(rows)


def test_samples_of_small_photos_are_named_by_their_files(tmp_path):
    photos, out = write_photos(tmp_path / "photos", 6), tmp_path / "run"
    assert train(photos, out, "--backbone", "resnet8", "--method", "ce") == 0
    for line in lines_of(out / "ce" / "seed0" / "samples.csv"):
        assert (photos / line["label"]) in Path(line["path"]).parents


def test_of_several_arrays_the_one_that_is_classified_is_told(tmp_path, capsys):
    data = write_arrays(tmp_path / "f.npz", train=arrays(30))
    assert train(data, tmp_path / "run", "--method", "ce") == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(data)]) == 0  # one needs no word
    assert not capsys.readouterr().err
    parts = {"train": arrays(30), "test": {"inputs": arrays(9, 1)["inputs"]}}
    several = write_arrays(tmp_path / "g.npz", **parts)
    with pytest.warns(UserWarning, match=r"g\.npz: inputs of train taken, of test left out"):
        assert main(["predict", str(tmp_path / "run"), str(several)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 30


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "meta-iada"],
        ["--backbone", "resnet8"],
        ["--epochs", "0"],
        ["--workers", "0"],
        ["--seeds", "1"],
        ["--meta-per-class", "0"],
        ["--pretrained"],
        ["--device", "cpu"],
    ],
)
def test_options_of_own_data_are_refused_beside_a_configuration(tmp_path, capsys, words):
    file, out = tmp_path / "run.toml", tmp_path / "run"
    file.write_text("[trainer]\nepochs = 1\n")
    assert main(["train", "--config", str(file), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert f"{words[0]}: expected options of training on --data" in error
    assert "--set trainer.method=ce" in error
    assert not out.exists()


def test_a_method_predicts_as_it_was_evaluated(tmp_path):
    """LDAM's logits are cosines: the head alone would be another classifier."""
    data = write_arrays(tmp_path / "f.npz", train=arrays(60), test=arrays(30, 1))
    out = tmp_path / "run"
    methods = ("ce", "ldam-drw", "meta-iada")
    assert train(data, out, "--meta-per-class", "2", "--method", *methods) == 0
    given = read_own(data)["test"]
    for method in methods:
        folder = out / method / "seed0"
        record = json.loads((folder / "record.json").read_text())
        found = load_trained(folder, "last").outputs(given, torch.device("cpu"))
        measured = measure(found.logits, found.labels, torch.tensor(record["class_counts"])).metrics
        for name in ("top1", "nll", "ece"):
            assert measured[name] == pytest.approx(record["last"][name], abs=1e-5), (method, name)


def test_other_photos_under_the_same_names_are_other_data(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 6)
    out = tmp_path / "run"
    words = ["--backbone", "resnet8", "--image-size", "8", "--meta-per-class", "2"]
    assert train(photos, out, *words, "--method", "meta-iada") == 0
    assert main(["labels", str(out)]) == 0
    changed = photos / "cat" / "0.png"
    former = changed.read_bytes()
    changed.rename(photos / "cat" / "zz.png")  # as many cats, in another order
    capsys.readouterr()
    assert main(["labels", str(out)]) == 2
    assert "expected the samples that" in capsys.readouterr().err
    (photos / "cat" / "zz.png").unlink()
    from PIL import Image

    rng = np.random.default_rng(9)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(changed)
    assert train(photos, out, *words, "--method", "meta-iada") == 2
    assert "another split" in capsys.readouterr().err
    assert main(["labels", str(out)]) == 2
    changed.write_bytes(former)
    assert train(photos, out, *words, "--method", "meta-iada") == 0
    assert main(["labels", str(out)]) == 0


def test_a_run_that_diverges_does_not_keep_the_others(features, tmp_path, capsys, monkeypatch):
    asked = []

    def stub(planned):
        asked.append(planned.entry.key)
        if planned.entry.key == "isda":
            raise FloatingPointError("loss: expected a finite number, got nan at step 3")
        return run(planned)

    monkeypatch.setattr(command_module, "run", stub)
    out = tmp_path / "run"
    words = ["--method", "isda", "ce", "logit-adjustment"]
    assert train(features, out, *words) == 2
    assert asked == ["isda", "ce", "logit-adjustment"]
    printed = capsys.readouterr()
    assert "got nan at step 3" in printed.err
    assert "ISDA" in printed.err
    page = (out / "index.html").read_text()
    assert "LA" in page
    assert train(features, tmp_path / "alone", "--method", "isda") == 2
    assert not (tmp_path / "alone" / "index.html").exists()


def test_a_row_of_which_a_run_diverged_does_not_keep_the_next_one(tmp_path, capsys, monkeypatch):
    asked = []

    def stub(recipe, *others):
        asked.append(recipe.name)
        if recipe.name == "digits/long-tail":
            raise FloatingPointError("CE, seed 0: loss: expected a finite number, got nan")

    monkeypatch.setattr(command_module, "_run", stub)
    assert main(["paper", "--table", "digits", "--out", str(tmp_path)]) == 2
    assert asked == ["digits/long-tail", "digits/noise"]
    assert "CE, seed 0: loss" in capsys.readouterr().err


def test_what_is_not_there_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["labels", "runs/typo"]) == 2
    assert "no run and no data at runs/typo" in capsys.readouterr().err
    assert train("typo", "runs/other") == 2
    assert "nothing at typo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    assert main(["labels", "runs/begun"]) == 2
    assert "runs/begun: expected a run in it, got no model.json" in capsys.readouterr().err


def test_runs_are_not_written_into_the_data(tmp_path, capsys):
    photos, clean = write_photos(tmp_path / "photos", 4), write_photos(tmp_path / "clean", 2)
    (tmp_path / "link").symlink_to(photos)
    before = sorted(tmp_path.rglob("*"))
    for out in (photos, photos / "runs" / "a", tmp_path / "link" / "a", clean / "a"):
        assert train(photos, out, "--meta", str(clean)) == 2
        assert "--out: expected a folder outside of the data, got" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    data = tmp_path / "data"
    data.mkdir()
    photos.rename(data / "train")
    for out in (data, data / "train" / "runs"):
        assert train(data, out) == 2
        assert "--out: expected a folder outside of the data, got" in capsys.readouterr().err
    words = ["--backbone", "resnet8", "--method", "ce"]
    for _ in range(2):  # beside the parts nothing is read
        assert train(data, data / "runs", *words) == 0


def test_damaged_weights_are_named(features, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(features, out, "--method", "ce") == 0
    best = out / "ce" / "seed0" / "best.pt"
    for content in (b"", b"not weights"):
        best.write_bytes(content)
        assert main(["predict", str(out), str(features)]) == 2
        assert str(best) in capsys.readouterr().err


def test_small_photos_that_are_not_square(tmp_path, capsys):
    from PIL import Image

    for place, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.full((8, 12, 3), 80 * place + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    out = tmp_path / "run"
    assert train(tmp_path / "photos", out, "--backbone", "resnet8", "--method", "ce") == 0
    file = tmp_path / "classes.csv"
    assert main(["predict", str(out), str(tmp_path / "photos"), "--out", str(file)]) == 0
    assert len(file.read_text().splitlines()) == 1 + 18
    other = tmp_path / "other.png"
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(other)
    assert main(["predict", str(out), str(other)]) == 2
    assert "of size [8, 12]" in capsys.readouterr().err
