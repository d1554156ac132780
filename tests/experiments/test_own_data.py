"""Data of one's own by one command: what can be read, what is refused, and what is left to use."""

import csv
import json
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch

from iada.cli import main
from iada.experiments.datasets.images import open_image
from iada.experiments.datasets.own import read_own, read_unlabelled
from iada.experiments.model_file import load_trained, training_samples

Image = pytest.importorskip("PIL.Image")

CLASSES = ("cat", "dog", "owl")
QUICK = ["--backbone", "resnet8", "--epochs", "2", "--meta-per-class", "2", "--device", "cpu"]
SMALL = ["--set", "trainer.batch_size=8", "trainer.meta_batch_size=6", "trainer.ce_epochs=1"]


def write_photos(root, count=8, size=(8, 8), mode="RGB", suffix="png"):
    """A folder for each class, each of its own brightness."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 30, (size[1], size[0], 3)) + 100 * place
            image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            image.save(root / name / f"{number}.{suffix}")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on small photos, with another method beside it, and where both are."""
    folder = tmp_path_factory.mktemp("own")
    photos, out = write_photos(folder / "photos", 10), folder / "runs"
    words = ["train", "--data", str(photos), "--out", str(out), "--method", "meta-iada", "ce"]
    assert main([*words, *QUICK, *SMALL]) == 0
    return photos, out


def test_one_command_trains_and_reports(trained, capsys):
    photos, out = trained
    page = (out / "index.html").read_text()
    assert "photos" in page
    assert "CE on train + meta" in page
    assert "published" not in page
    assert "as in several papers" not in page
    assert str(photos) in page  # the command that made it
    assert "There is no test set: figures are on the validation set." in page
    assert "Validation accuracy of each class" in page
    assert "accuracy of the validation samples" in page
    assert not re.search(r"\btest (samples|accuracy)", page, re.IGNORECASE)
    words = ["train", "--data", str(photos), "--out", str(out), "--method", "ce", "meta-iada"]
    assert main([*words, *QUICK, *SMALL]) == 0  # of runs that are there
    assert len(re.findall("accuracy .* on the validation set at", capsys.readouterr().out)) == 2
    record = json.loads((out / "meta-iada" / "seed0" / "record.json").read_text())
    assert record["split"]["class_counts"]["meta"] == [2, 2, 2]
    assert record["split"]["class_counts"]["test"] == [2, 2, 2]
    assert record["deviations"] == []
    beside = json.loads((out / "ce" / "seed0" / "record.json").read_text())
    assert beside["class_counts"] == [8, 8, 8]  # the meta samples too


def test_the_same_command_goes_on_and_another_is_refused(trained, capsys):
    photos, out = trained
    words = ["train", "--data", str(photos), "--out", str(out), "--method", "meta-iada", *QUICK]
    before = (out / "meta-iada" / "seed0" / "record.json").read_bytes()
    assert main([*words, *SMALL]) == 0
    assert (out / "meta-iada" / "seed0" / "record.json").read_bytes() == before
    assert main([*words, *SMALL, "trainer.lr=0.01"]) == 2
    assert "one with the same settings" in capsys.readouterr().err
    assert main([*words, *SMALL, "trainer.lr=0.01", "trainer.milestones=[1]"]) == 2
    text = capsys.readouterr().err
    assert "one with another settings (lr 0.05, here 0.01; milestones [], here [1]);" in text
    words[words.index("2")] = "3"
    words += ["--test", "0.2"]
    assert main([*words, *SMALL]) == 2
    text = capsys.readouterr().err
    assert "another settings (epochs 2, here 3)" in text
    assert "class_counts train [6, 6, 6], here [4, 4, 4]" in text
    assert "samples of train" in text


@pytest.mark.parametrize("command", ["predict", "export"])
def test_the_help_says_what_the_best_epoch_is(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "best on the samples held out, whose labels may be wrong too, or of the last" in text


def test_predict_from_the_run_and_from_an_export(trained, tmp_path, capsys):
    pytest.importorskip("safetensors")
    photos, out = trained
    run = out / "meta-iada" / "seed0"
    assert main(["predict", str(run), str(photos)]) == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 30
    assert {row["class"] for row in rows} <= set(CLASSES)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    file = tmp_path / "model.safetensors"
    assert main(["export", str(run), str(file)]) == 0
    assert main(["predict", str(file), str(photos), "--out", str(tmp_path / "p.csv")]) == 0
    assert (tmp_path / "p.csv").read_text() == text
    one = photos / "cat" / "0.png"
    capsys.readouterr()
    assert main(["predict", str(run), str(one), "--which", "last"]) == 0
    assert str(one) in capsys.readouterr().out
    assert main(["predict", str(out), str(photos)]) == 2  # two runs below it
    assert "2 runs" in capsys.readouterr().err
    (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:100])
    assert main(["predict", str(tmp_path / "damaged.safetensors"), str(photos)]) == 2
    assert "damaged.safetensors: expected" in capsys.readouterr().err


def test_the_best_epoch_is_kept(trained):
    _, out = trained
    run = out / "meta-iada" / "seed0"
    record = json.loads((run / "record.json").read_text())
    state = torch.load(run / "best.pt", weights_only=True)
    assert state["epoch"] == record["best_epoch"] + 1
    assert state["judged"] == {record["best_by"]: record["best"]["top1"]}
    assert load_trained(run, "last").about["epoch"] == 2


def test_labels_ranks_the_samples_of_a_run(trained, tmp_path, capsys):
    pytest.importorskip("jinja2")
    _, out = trained
    run, found = out / "meta-iada" / "seed0", tmp_path / "labels"
    assert main(["labels", str(run), "--out", str(found), "--top", "5"]) == 0
    rows = list(csv.DictReader((found / "labels.csv").read_text().splitlines()))
    assert len(rows) == 18  # of 30, six are held out and six the meta set
    assert [int(row["rank"]) for row in rows] == list(range(1, 19))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        assert f"/{row['label']}/" in row["path"]
        assert float(row["loss"]) > 0
        assert -1 <= float(row["epsilon"]) <= 1
    page = (found / "labels.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert rows[0]["path"] in page
    assert rows[5]["path"] not in page
    assert main(["labels", str(out / "ce" / "seed0"), "--out", str(found)]) == 2
    assert "train with --method meta-iada" in capsys.readouterr().err


def test_labels_of_changed_data_are_refused(tmp_path, capsys):
    photos, out = write_photos(tmp_path / "photos", 6), tmp_path / "run"
    assert main(["labels", str(photos), "--out", str(out), *QUICK, *SMALL]) == 0  # trains first
    assert (out / "labels.html").exists()
    for file in (photos / "cat").iterdir():
        file.unlink() if file.name != "0.png" else None
    assert main(["labels", str(out)]) == 2
    assert "put the data back" in capsys.readouterr().err


def names_of(parts):
    return {name: len(part) for name, part in parts.items()}


def test_every_kind_of_source(tmp_path):
    photos = write_photos(tmp_path / "photos")
    by_folder = read_own(photos)
    assert names_of(by_folder) == {"train": 18, "validation": 6}
    lines = [f"photos/{name}/{k}.png {name}" for name in CLASSES for k in range(8)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    commas = ["path,label", *(line.replace(" ", ",") for line in lines)]
    (tmp_path / "list.csv").write_text("\n".join(commas))
    images = by_folder["train"].inputs.permute(0, 2, 3, 1).numpy()
    labels = by_folder["train"].labels.numpy()
    np.savez(tmp_path / "a.npz", inputs=images, labels=labels, class_names=np.array(CLASSES))
    for name in ("list.txt", "list.csv"):
        parts = read_own(tmp_path / name)
        assert parts["train"].class_names == CLASSES
        assert torch.equal(parts["train"].inputs, by_folder["train"].inputs)
    parts = read_own(tmp_path / "a.npz", validation=0.0)
    assert torch.equal(parts["train"].inputs, by_folder["train"].inputs)
    assert parts["train"].class_names == CLASSES
    write_photos(tmp_path / "more", mode="L")
    (tmp_path / "more.csv").write_text("\n".join(commas).replace("photos/", "more/"))
    given = read_own(photos, validation=str(tmp_path / "more.csv"), meta=str(photos))
    assert names_of(given) == {"train": 24, "validation": 24, "meta": 24}
    numbers = [f"photos/{name}/0.png {9 + k}" for k, name in enumerate(CLASSES)]
    (tmp_path / "list.txt").write_text("\n".join(numbers))
    assert read_own(tmp_path / "list.txt", validation=0.0)["train"].class_names == ("9", "10", "11")


def test_a_saved_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    photos = write_photos(tmp_path / "photos", 4)
    files = sorted(photos.rglob("*.png"))
    columns = {"image": list(map(str, files)), "label": [file.parent.name for file in files]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    parts = read_own(tmp_path / "saved", validation=0.25)
    assert names_of(parts) == {"train": 9, "validation": 3}
    assert torch.equal(parts["train"].inputs, read_own(photos, 0.25)["train"].inputs)
    stored = read_own(tmp_path / "saved", memory=False)["train"].inputs[0]
    assert open_image(stored, photo=True).size == (8, 8)
    for memory in (None, False):
        train = read_own(tmp_path / "saved", validation=0.25, memory=memory)["train"]
        for row in range(len(train)):
            place = re.fullmatch(r"train\[(\d+)\]", train.place(row))
            assert rows[int(place[1])]["label"] == train.labels[row]
    texts = datasets.Dataset.from_dict({"text": list("abcdef"), "label": [0, 0, 0, 1, 1, 1]})
    texts.save_to_disk(str(tmp_path / "texts"))
    train = read_own(tmp_path / "texts", validation=0.4)["train"]
    assert [(train.place(i), train.inputs[i]) for i in range(4)] == [
        (f"train[{row}]", "abcdef"[row]) for row in map("abcdef".index, train.inputs)
    ]


def test_without_the_library_it_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "pip install datasets" in capsys.readouterr().err


def test_images_in_folders_of_a_class(tmp_path):
    photos = write_photos(tmp_path / "photos", 4)
    flat = read_own(photos, 0.0)["train"]
    for name in ("more/deeper", ".hidden"):
        (photos / "dog" / name).mkdir(parents=True)
        shutil.copy(photos / "owl" / "0.png", photos / "dog" / name / "x.png")
    (photos / "dog" / "more" / "back").symlink_to(photos / "dog")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = read_own(photos, 0.0)["train"]
    assert train.class_counts().tolist() == [4, 5, 4]
    places = [place for place in train.places if "deeper" not in place]
    assert places == flat.places  # in the order that they had
    parent = tmp_path / "parent"
    for name in ("first", "second"):
        write_photos(parent / name, 4)
    with pytest.warns(
        UserWarning, match="all images lie below the folders of first, second, taken"
    ):
        read_own(parent, 0.0)


def test_files_that_are_skipped_are_told(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 4)
    for number in range(3):
        (photos / "dog" / f"{number}.png").rename(photos / "dog" / f"{number}.HEIC")
    (photos / "loose.png").write_bytes((photos / "cat" / "0.png").read_bytes())
    with (
        pytest.warns(UserWarning, match="photos: skipped 3 files: .heic$"),
        pytest.warns(UserWarning, match="photos: skipped images in no class's folder: 1"),
    ):
        assert read_own(photos, 0.0)["train"].class_counts().tolist() == [4, 1, 4]
    with pytest.warns(UserWarning, match="photos: skipped 3 files: .heic$"):
        assert len(read_unlabelled(photos)) == 10
    (photos / "dog" / "3.png").rename(photos / "dog" / "3.heic")
    with pytest.raises(
        ValueError, match=r"dog: .* got none, but 4 files: .heic; .*\.jpg, .*\.webp"
    ):
        read_own(photos)
    with pytest.raises(ValueError, match="dog: expected images, got none, but 4 files: .heic"):
        read_unlabelled(photos / "dog")


@pytest.mark.parametrize(
    ("levels", "kind", "message"),
    [
        (np.linspace(0, 1, 64), np.float32, "floating-point ones"),
        (np.linspace(0, 4095, 64), np.uint16, "levels from 0 to 4095"),
        (np.linspace(0, 70000, 64), np.int32, "levels from 0 to 70000"),
        (np.linspace(-9, 60000, 64), np.int32, "levels from -9 to 60000"),
    ],
)
def test_grey_levels_that_would_be_lost_are_refused(tmp_path, levels, kind, message):
    photos = write_photos(tmp_path / "photos", 4)
    pixels = levels.astype(kind).reshape(8, 8)
    Image.fromarray(pixels).save(photos / "dog" / "9.tif")
    with pytest.raises(OSError, match=f"dog/9.tif: expected grey levels .*, got {message}; scale"):
        read_own(photos)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(photos / "dog" / "9.tif")  # black is black
    assert len(read_own(photos, 0.0)["train"]) == 13


def test_photos_are_read_as_a_person_sees_them(tmp_path):
    turned = Image.new("RGB", (6, 4), "black")
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (6, 4)
    assert open_image(tmp_path / "turned.jpg", photo=True).size == (4, 6)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png", photo=True).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 257 * 100, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png", photo=True).getpixel((0, 0)) == (100, 100, 100)
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png", photo=True).getpixel((0, 0)) == (7, 7, 7)


def test_photos_of_all_sizes_and_modes_train(tmp_path):
    photos = tmp_path / "photos"
    write_photos(photos, 5, (90, 30), "L", "jpg")
    for place, name in enumerate(CLASSES):
        Image.new("RGBA", (20 + place, 70), (place, 0, 0, 90)).save(photos / name / "x.png")
    words = ["train", "--data", str(photos), "--out", str(tmp_path / "run")]
    words += ["--backbone", "resnet8"]
    words += ["--epochs", "1", "--image-size", "8", "--method", "ce", "--device", "cpu"]
    assert main(words) == 0
    about = json.loads((tmp_path / "run" / "ce" / "seed0" / "model.json").read_text())
    assert (about["inputs"], about["size"], about["shape"]) == ("images", 8, "crop")
    assert main(["predict", str(tmp_path / "run"), str(photos)]) == 0


def test_features_of_an_npz_train_a_small_network(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    inputs = (rng.normal(size=(60, 5)) + 3 * labels[:, None]).astype(np.float32)
    np.savez(tmp_path / "f.npz", inputs=inputs, labels=labels)
    out = tmp_path / "run"
    words = ["train", "--data", str(tmp_path / "f.npz"), "--out", str(out), "--method", "ce"]
    assert main([*words, "--epochs", "3", "--device", "cpu"]) == 0
    assert "NEW.npz" in capsys.readouterr().out
    other = [*words[:4], str(tmp_path / "b"), *words[5:], "--backbone", "resnet32"]
    assert main(other) == 2
    assert "--backbone: expected one for features, got 'resnet32'" in capsys.readouterr().err
    np.savez(tmp_path / "new.npz", inputs=inputs[:4])
    capsys.readouterr()
    assert main(["predict", str(out), str(tmp_path / "new.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("row 0,")
    assert main([*words, "--backbone", "timm/resnet18"]) == 2
    assert "--backbone: expected one for features" in capsys.readouterr().err


def test_what_cannot_be_trained_on_is_named(tmp_path, capsys):
    def refused(*words):
        assert main(["train", "--out", str(tmp_path / "run"), *words]) == 2
        return capsys.readouterr().err

    photos = write_photos(tmp_path / "photos", 4)
    data = ["--data", str(photos)]
    assert "nothing at" in refused("--data", str(tmp_path / "none"))
    assert "expected --data PATH or --config FILE, got neither" in refused()
    assert "no.toml: expected a TOML file, got nothing there" in refused("--config", "no.toml")
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    (photos / "cat" / "0.png").rename(one / "cat" / "0.png")
    assert "expected at least 2 classes, got 1 (cat)" in refused("--data", str(one))
    text = refused(*data, *QUICK, "--meta-per-class", "3")
    assert (
        "class 'cat': expected at least 4 samples: 3 to take (meta_per_class), 1 to stay, got 2"
        in text
    )
    assert "ask for 1 at most in meta_per_class" in text
    assert "--validation: expected a share" in refused(*data, "--validation", "0")
    assert "--method: expected one of" in refused(*data, "--method", "focal")
    assert "--meta: expected no --meta-per-class" in refused(*data, *QUICK, "--meta", str(photos))
    (photos / "dog" / "1.png").write_bytes(b"no image")
    (photos / "owl" / "2.png").write_bytes((photos / "owl" / "1.png").read_bytes()[:60])
    text = refused(*data)
    assert "dog/1.png: expected an image, got a file that Pillow does not know" in text
    assert "owl/2.png: expected an image" in text
    assert not (tmp_path / "run" / "meta-iada").exists()


def test_all_images_that_cannot_be_read_are_counted(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 8)
    broken = [photos / name / f"{k}.png" for name in CLASSES[:2] for k in range(6)]
    for file in broken:
        file.write_bytes(file.read_bytes()[: int(file.stem) * 9])  # the first is empty
    with pytest.raises(OSError, match="^12 of 24 images cannot be read\n") as error:
        read_own(photos, 0.0)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:11]] == list(map(str, broken[:10]))
    assert "expected an image, got an empty file" in lines[1]
    assert lines[11] == "and 2 more"
    rows = [f"{file} {file.parent.name}" for file in sorted(photos.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    with pytest.raises(OSError, match="^12 of 24 images cannot be read\n"):
        read_own(tmp_path / "list.txt")


def test_an_unknown_class_of_a_given_part_is_named(tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    more = write_photos(tmp_path / "more", 3)
    (more / "dog").rename(more / "wolf")
    with pytest.raises(ValueError, match="validation: expected the classes .* got 'wolf' too"):
        read_own(photos, validation=str(more))


def test_a_recipe_of_ones_own(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 6)
    file = tmp_path / "mine.toml"
    file.write_text('[model]\nbackbone = "resnet8"\n[trainer]\nlr = 0.025\nepochs = 1\n')
    words = ["train", "--data", str(photos), "--recipe", str(file), "--method", "ce"]
    assert main([*words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "run" / "ce" / "seed0" / "record.json").read_text())
    assert record["settings"]["lr"] == 0.025
    assert record["model"]["backbone"] == "resnet8"
    file.write_text("[trainer]\nlrr = 1\n")
    assert main([*words, "--out", str(tmp_path / "run2")]) == 2
    assert "lrr: expected one of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test", "validation"])
def test_parts_that_share_images_are_refused(tmp_path, name):
    photos = write_photos(tmp_path / "photos", 4)
    link = tmp_path / "link"
    link.symlink_to(photos)
    for path in (photos, link):
        with pytest.raises(ValueError, match=rf"{name} \(.*{path.name}\): .* 12 of 12 that are "):
            read_own(photos, **{name: str(path)})
    some = tmp_path / "some.txt"
    more = write_photos(tmp_path / "more", 2, mode="L")
    lines = [f"more/{one}/0.png {one}" for one in CLASSES]
    some.write_text("\n".join([*lines, f"{photos}/cat/0.png cat"]))
    with pytest.raises(ValueError, match=r"1 of 4 that are there \(.*cat/0.png\)"):
        read_own(photos, **{name: str(some)})
    some.write_text("\n".join(lines))
    assert names_of(read_own(photos, **{name: str(some)}))[name] == 3
    copied = shutil.copytree(photos, tmp_path / "copied")
    with pytest.raises(
        ValueError, match=r"12 of 12 with the content of some .*copied.* is .*photos"
    ):
        read_own(photos, **{name: str(copied)})
    shutil.copy(photos / "cat" / "0.png", more / "cat" / "same.png")  # as honest data may have
    with pytest.warns(UserWarning, match=r"1 of 7 with the content of some .*same.png is "):
        read_own(photos, **{name: str(more)})


def test_a_meta_set_apart_from_what_is_held_out(tmp_path):
    photos = write_photos(tmp_path / "photos", 5)
    with pytest.raises(ValueError, match="meta .*apart from those of validation, got 3 of 15 that"):
        read_own(photos, meta=str(photos))
    copied = shutil.copytree(photos, tmp_path / "copied")
    with pytest.raises(ValueError, match="meta .*validation, got 3 of 15 with the content of some"):
        read_own(photos, meta=str(copied))
    given = {"validation": str(write_photos(tmp_path / "later", 2, mode="L"))}
    with pytest.warns(UserWarning, match="meta .*apart from those of train, got 15 of 15 that are"):
        parts = read_own(photos, meta=str(photos), **given)
    assert names_of(parts) == {"train": 15, "validation": 6, "meta": 15}
    with pytest.raises(ValueError, match="meta .*apart from those of validation, got 6 of 6 that"):
        read_own(photos, meta=given["validation"], **given)


def test_rows_that_parts_share(tmp_path):
    inputs, labels = np.eye(12, dtype=np.float32), np.arange(12) % 2
    np.savez(tmp_path / "f.npz", inputs=inputs, labels=labels)
    with pytest.raises(ValueError, match=r"test .* 12 of 12 that are there \(inputs\[0\], "):
        read_own(tmp_path / "f.npz", test=str(tmp_path / "f.npz"))
    with pytest.raises(ValueError, match=r"meta .* validation, got 2 of 12 that are there"):
        read_own(tmp_path / "f.npz", meta=str(tmp_path / "f.npz"))
    np.savez(tmp_path / "g.npz", inputs=inputs[:6], labels=labels[:6])
    with pytest.warns(UserWarning, match=r"6 of 6 with .* \(inputs\[0\] is inputs\[0\], "):
        read_own(tmp_path / "f.npz", test=str(tmp_path / "g.npz"))  # as features it may be chance
    images = (255 * inputs).astype(np.uint8).reshape(12, 4, 3)
    np.savez(tmp_path / "f.npz", inputs=images, labels=labels)
    np.savez(tmp_path / "g.npz", inputs=images[:6], labels=labels[:6])
    given = {"path": str(tmp_path / "f.npz"), "test": str(tmp_path / "g.npz")}
    with pytest.raises(ValueError, match="test .* 6 of 6 with the content of some there"):
        read_own(**given)
    assert len(read_own(**given, check=False)["test"]) == 6
    assert len(training_samples({**given, "reader": "own", "check": False})) == 10


def test_an_image_with_several_labels_is_refused(tmp_path):
    write_photos(tmp_path / "photos", 4)
    lines = [f"photos/{name}/{k}.png,{name}" for name in CLASSES for k in range(4)]
    data = tmp_path / "list.csv"
    data.write_text("\n".join([*lines, "photos/cat/0.png,owl", "photos/../photos/dog/1.png,cat"]))
    with pytest.raises(ValueError, match=r"got 2 with several \(.*cat/0.png: cat, owl; .*dog/1"):
        read_own(data)
    data.write_text("\n".join([*lines, lines[0]]))
    with pytest.warns(UserWarning, match="1 of 13 images are listed again"):
        read_own(data)
