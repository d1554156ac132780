"""Data of one's own as people have it: names for labels, headers, alpha channels, alphabets."""

import csv
import json
import sys
import warnings

import numpy as np
import pytest
import torch

from iada.cli import main
from iada.experiments.datasets.own import read_arrays, read_own, read_unlabelled
from iada.experiments.model_file import training_samples
from iada.experiments.report.style import paint

Image = pytest.importorskip("PIL.Image")
CLASSES = ("猫", "dog", "owl")


def photos(folder, count=4):
    """(path from the folder, class) of each image written there."""
    listed = []
    for place, name in enumerate(CLASSES):
        for number in range(count):
            path = folder / f"{place}, {number}.png"  # a comma and a space
            Image.new("RGB", (8, 8), (80 * place, 9 * number, 0)).save(path)
            listed.append((path.name, name))
    return listed


def refused(capsys, *words):
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["U", "S"])
def test_names_as_labels_of_arrays(tmp_path, kind):
    names = np.array(["dog", "ant", "owl"] * 4).astype(kind)
    inputs = np.arange(24, dtype=np.float32).reshape(12, 2)
    given = {"valid_inputs": inputs[:2], "valid_labels": names[[2, 0]]}
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=names, **given)
    parts = read_own(tmp_path / "a.npz")
    assert parts["train"].class_names == ("ant", "dog", "owl")
    assert parts["train"].labels.tolist() == [1, 0, 2] * 4
    assert parts["validation"].labels.tolist() == [2, 1]
    order = np.array(["owl", "dog", "ant"])
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=names, class_names=order)
    assert read_own(tmp_path / "a.npz", 0.0)["train"].labels.tolist() == [1, 2, 0] * 4
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=names, class_names=order[:2])
    with pytest.raises(ValueError, match="train_labels: expected one of the classes owl, dog"):
        read_own(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.zeros((9, 16, 16, 4), np.uint8), np.arange(9) % 3, r"_inputs: .* \(9, 16, 16, 4\)"),
        (np.zeros((9, 2, 16, 16), np.uint8), np.arange(9) % 3, r"_inputs: .* \(9, 2, 16, 16\)"),
        (np.zeros((9, 2), np.float32), np.full(9, np.nan), "_labels: expected 9 whole numbers"),
        (np.zeros((9, 2), np.float32), np.array(["a"] * 9, object), r"labels\.astype\(str\)"),
        (
            np.where(np.eye(9, 2, 1), np.nan, 0.0),
            np.arange(9) % 3,
            r"_inputs: expected finite features, got nan at \[0, 1\], and 1 in all",
        ),
    ],
)
def test_arrays_that_cannot_be_trained_on(tmp_path, inputs, labels, message):
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=labels)
    with pytest.raises(ValueError, match=message):
        read_own(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (1 + np.arange(9) % 3, r"1 of 4 classes .* samples \(0\); do labels start at 1\?"),
        (10 * (np.arange(9) % 2), r"9 of 11 classes .* \(1, 2, 3, 4, 5, …\); are numbers left"),
    ],
)
def test_classes_without_samples_are_told(tmp_path, labels, message):
    np.savez(tmp_path / "a.npz", inputs=np.eye(9, dtype=np.float32), labels=labels)
    with pytest.warns(UserWarning, match=message):
        read_own(tmp_path / "a.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second time; and of names the order is known
        training_samples({"path": str(tmp_path / "a.npz"), "reader": "own"})
        names = {"class_names": np.array(list("abcdefghijk"))}
        np.savez(tmp_path / "a.npz", inputs=np.eye(9, dtype=np.float32), labels=labels, **names)
        read_own(tmp_path / "a.npz")
        read_arrays(tmp_path / "a.npz")


def test_arrays_of_images_that_are_not_square(tmp_path, capsys):
    inputs = np.random.default_rng(0).integers(0, 256, (24, 12, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=np.arange(24) % 2)
    np.savez(tmp_path / "new.npz", inputs=inputs[:3])
    np.savez(tmp_path / "turned.npz", inputs=inputs[:3].swapaxes(1, 2))
    words = ["--backbone", "resnet8", "--method", "ce", "--epochs", "1", "--device", "cpu"]
    run = ["train", "--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "run"), *words]
    assert main(run) == 0
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "new.npz")]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()[-4:]) == 4
    message = refused(capsys, "predict", tmp_path / "run", tmp_path / "turned.npz")
    assert "of size [12, 20], got torch.uint8 (3, 3, 20, 12)" in message


def write_csv(path, *rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_columns_by_their_names(tmp_path):
    listed = photos(tmp_path)
    plain = read_own(write_csv(tmp_path / "plain.csv", *listed), 0.0)["train"]
    assert plain.class_names == tuple(sorted(CLASSES))
    for header, order in (
        (("image_path", "label"), lambda path, name: (path, name)),
        (("id", "Class", "Filename"), lambda path, name: ("1", name, path)),
        (("path", "kind"), lambda path, name: (path, name)),
    ):
        rows = [order(*row) for row in listed]
        read = read_own(write_csv(tmp_path / "list.csv", header, *rows), 0.0)["train"]
        assert torch.equal(read.inputs, plain.inputs)
        assert torch.equal(read.labels, plain.labels)


@pytest.mark.parametrize("column", ["split", "Subset"])
def test_a_column_of_parts(tmp_path, column):
    listed = photos(tmp_path, 6)
    parts = ("train", "train", "Train", "val", "test", "test")
    rows = [(k, *row, parts[k % 6]) for k, row in enumerate(listed)]
    data = write_csv(tmp_path / "list.csv", ("id", "path", "label", column), *rows)
    with pytest.warns(UserWarning, match=r"list\.csv: columns id left out"):
        read = read_own(data)
    assert {name: part.class_counts().tolist() for name, part in read.items()} == {
        "train": [3, 3, 3],
        "validation": [1, 1, 1],
        "test": [2, 2, 2],
    }
    by_name = {str(tmp_path / path): (name, parts[k % 6]) for k, (path, name) in enumerate(listed)}
    for name, part in read.items():
        for row in range(len(part)):
            label, said = by_name[part.place(row)]
            assert (part.class_names[part.labels[row]], said.lower()[:3]) == (label, name[:3])
    rows[4] = (*rows[4][:3], "fold 3")
    write_csv(data, ("id", "path", "label", column), *rows)
    with pytest.raises(ValueError, match="line 6, column s.*: expected one of train, .*'fold 3'"):
        read_own(data)
    write_csv(data, ("path", "label", column), *[(*row, "test") for row in listed])
    with pytest.raises(ValueError, match="expected a part 'train', got test"):
        read_own(data)


def test_a_header_that_is_not_known_is_told(tmp_path):
    listed = photos(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"line 1: .* header with one of path, file, .*img"):
        read_own(write_csv(tmp_path / "a.csv", ("photograph", "label"), *listed))
    rows = [(path, "x", name) for path, name in listed]
    with pytest.raises(ValueError, match="line 1: expected a column of labels: label, "):
        read_own(write_csv(tmp_path / "a.csv", ("path", "set", "kind"), *rows))
    with pytest.raises(ValueError, match="line 3: expected 2 fields, as in the header, got 3"):
        read_own(write_csv(tmp_path / "a.csv", ("path", "label"), listed[0], rows[1]))


@pytest.mark.parametrize("suffix", ["csv", "txt"])
@pytest.mark.parametrize("header", [True, False])
def test_paths_that_start_from_elsewhere(tmp_path, monkeypatch, capsys, suffix, header):
    listed = photos(tmp_path)
    (tmp_path / "sub").mkdir()
    data = tmp_path / "sub" / f"list.{suffix}"
    if suffix == "csv":
        write_csv(data, *[("path", "label")] * header, *listed)
    else:
        data.write_text("\n".join(["path label"] * header + [f"{p} {name}" for p, name in listed]))
    tried, here = tmp_path / "sub" / listed[0][0], f"working directory, {tmp_path}, there is one:"
    for folder, remedies in ((tmp_path, [here, "write absolute ones"]), (tmp_path / "sub", [])):
        monkeypatch.chdir(folder)
        text = refused(capsys, "train", "--data", data.relative_to(folder), "--out", tmp_path / "o")
        assert str(tried) in text
        assert f"from {tmp_path / 'sub'}" in text
        assert all(remedy in text for remedy in remedies)
        assert ("there is one" in text) == bool(remedies)


def test_all_files_that_are_not_there_are_told(tmp_path):
    listed = photos(tmp_path)
    absent = [(f"none{k}.png", "owl") for k in range(12)]
    for name, rows in (
        ("a.csv", [("path", "label"), *absent, *listed]),
        ("b.csv", listed + absent),
    ):
        with pytest.raises(FileNotFoundError, match="got 12 of 24 that are no files") as error:
            read_own(write_csv(tmp_path / name, *rows))
        assert "none9.png\nand 2 more" in str(error.value)
        with pytest.raises(FileNotFoundError, match="got 12 of 24 that are no files"):
            read_unlabelled(tmp_path / name)


@pytest.mark.parametrize("suffix", ["csv", "txt"])
@pytest.mark.parametrize("header", [True, False])
def test_the_list_that_was_trained_on_is_classified(tmp_path, capsys, suffix, header):
    listed = photos(tmp_path)
    data, out = tmp_path / f"list.{suffix}", tmp_path / "run"
    if suffix == "csv":
        write_csv(data, *[("path", "label")] * header, *listed)
    else:
        lines = ["path label"] * header + [f"{path} {name}" for path, name in listed]
        data.write_text("\n".join(lines))
    words = ["--backbone", "resnet8", "--epochs", "1", "--method", "ce", "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")  # of the report's figures
        assert main(["train", "--data", str(data), "--out", str(out), *words]) == 0
    assert "Few-shot" not in (out / "index.html").read_text()
    record = json.loads((out / "ce" / "seed0" / "record.json").read_text())
    assert record["last"]["few"] is None
    capsys.readouterr()
    assert main(["predict", str(out), str(data)]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["path"] for row in rows] == [str(tmp_path / path) for path, _ in listed]


def test_other_alphabets_are_drawn_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = paint("x", "x", "x", lambda figure, axes: axes[0].set_title("猫"))
    assert "猫" in picture.wide


def test_a_split_called_valid(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b"], "label": [0, 1]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "valid": split}).save_to_disk(str(tmp_path / "saved"))
    assert set(read_own(tmp_path / "saved")) == {"train", "validation"}


def test_a_part_of_another_name_is_told(tmp_path):
    inputs, labels = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
    others = {"odd_inputs": inputs, "odd_labels": labels}
    np.savez(tmp_path / "a.npz", train_inputs=inputs, train_labels=labels, **others)
    with pytest.warns(UserWarning, match=r"a\.npz: odd left out; parts are train, "):
        assert "odd" not in read_own(tmp_path / "a.npz", 0.5)


def test_a_logger_that_is_not_installed_is_told_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    text = refused(capsys, "train", "--data", tmp_path, "--out", out, "--logger", "wandb")
    assert text == "error: wandb is not installed; pip install wandb\n"
    assert not out.exists()


def test_methods_of_own_data_are_listed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["labels", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "one or several of ce, cb-ce," in text
    assert "afr" not in text
