"""Every reader on tiny files in the true format: what comes out, and what is told of damage."""

import gzip
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from iada.experiments.datasets import BUNDLED, READERS
from iada.experiments.datasets.images import open_image
from tests.helpers import dataset_files as made


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("binary", [False, True])
def test_cifar(tmp_path, classes, binary):
    place = made.write_cifar(tmp_path, classes, binary)
    read = READERS[f"cifar{classes}"]
    for path in (tmp_path, place):
        parts = read(path)
        batches = 5 if classes == 10 else 1
        assert list(parts) == ["train", "test"]
        assert parts["train"].class_counts().tolist() == [2 * batches] * classes
        assert parts["test"].class_names[:2] == ("name0", "name1")
    first = made.cifar_images(2 * classes, 0)[3].reshape(3, 32, 32)
    assert np.array_equal(parts["train"].inputs[3].numpy(), first)
    assert parts["train"].labels[3] == 3


def test_a_pickle_that_calls_is_refused(tmp_path):
    place = made.write_cifar(tmp_path)
    trace = tmp_path / "called"

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    (place / "data_batch_1").write_bytes(pickle.dumps({"data": Call()}))
    with pytest.raises(ValueError, match="data_batch_1.*mkdir"):
        READERS["cifar10"](tmp_path)
    assert not trace.exists()


def test_numpy_of_today_is_read(tmp_path):
    place = made.write_cifar(tmp_path)
    content = pickle.loads((place / "data_batch_2").read_bytes(), encoding="bytes")
    (place / "data_batch_2").write_bytes(pickle.dumps(content, protocol=5))
    assert len(READERS["cifar10"](tmp_path)["train"]) == 100


def test_folder(tmp_path):
    parts = READERS["folder"](made.write_folder(tmp_path, suffix=".png"))
    assert list(parts) == ["train", "validation", "test"]
    train = parts["train"]
    assert train.inputs.shape == (6, 3, 8, 8)
    assert train.inputs.dtype == torch.uint8
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.array(Image.open(tmp_path / "train/dog/0001.png"))
    assert np.array_equal(train.inputs[4].permute(1, 2, 0).numpy(), expected)


def test_folder_of_classes_alone_and_of_large_images(tmp_path):
    made.write_folder(tmp_path / "plain", parts=(".",))
    assert list(READERS["folder"](tmp_path / "plain")) == ["train"]
    made.write_folder(tmp_path / "large", size=(65, 8))
    parts = READERS["folder"](tmp_path / "large")
    assert parts["train"].inputs[0] == tmp_path / "large/train/cat/0000.jpg"
    made.write_folder(tmp_path / "mixed")
    made.write_image(tmp_path / "mixed/test/cat/0000.jpg", (9, 8))
    assert not isinstance(READERS["folder"](tmp_path / "mixed")["train"].inputs, torch.Tensor)
    with pytest.raises(ValueError, match="memory: expected images of one size"):
        READERS["folder"](tmp_path / "mixed", memory=True)
    parts = READERS["folder"](made.write_folder(tmp_path / "small"), memory=False)
    assert not isinstance(parts["train"].inputs, torch.Tensor)


def test_lists(tmp_path):
    parts = READERS["lists"](made.write_lists(tmp_path))
    assert [len(part) for part in parts.values()] == [6, 6, 6]
    assert parts["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert parts["test"].inputs[1] == tmp_path / "test/n01440761/im age_1.JPEG"
    assert open_image(parts["test"].inputs[1]).size == (8, 8)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path, packed):
    parts = READERS["mnist"](made.write_mnist(tmp_path, packed=packed))
    assert parts["train"].inputs.shape == (40, 1, 28, 28)
    assert parts["test"].class_counts().tolist() == [4] * 10


def test_waterbirds(tmp_path):
    parts = READERS["waterbirds"](made.write_waterbirds(tmp_path))
    assert list(parts) == ["train", "validation", "test"]
    assert parts["train"].groups.tolist() == [0, 1, 2, 3]
    assert parts["train"].group_names[1] == "landbird, water"
    assert parts["train"].labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("as_csv", [False, True])
def test_celeba(tmp_path, as_csv):
    parts = READERS["celeba"](made.write_celeba(tmp_path, as_csv))
    assert parts["validation"].groups.tolist() == [0, 1, 2, 3]
    assert parts["validation"].group_names[3] == "blond, male"
    assert parts["test"].inputs[0] == tmp_path / "img_align_celeba/000009.jpg"


def test_civilcomments(tmp_path):
    parts = READERS["civilcomments"](made.write_civilcomments(tmp_path))
    train = parts["train"]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.groups.tolist() == [0, 1, 2, 3]
    assert train.inputs[1] == 'A comment, with "quotes"\nand a line, 1'
    rows, columns = train.members.nonzero(as_tuple=True)
    assert [(int(row), train.member_names[c]) for row, c in zip(rows, columns, strict=True)] == [
        (1, "non-toxic, male"),
        (1, "non-toxic, black"),
        (3, "toxic, male"),
        (3, "toxic, black"),
    ]
    assert torch.equal(train.subset(torch.tensor([3])).members, train.members[3:])


def test_glt_parts_name_the_same_attributes(tmp_path):
    made.write_glt(tmp_path)
    file = tmp_path / "annotation.json"
    found = json.loads(file.read_text())
    for key in found["train"]["attribute"]:
        found["train"]["attribute"][key] = 0
    file.write_text(json.dumps(found))
    parts = READERS["glt"](file, images=tmp_path / "images")
    assert parts["train"].groups.tolist() == [0] * 6
    assert {len(part.group_names) for part in parts.values()} == {3}


def test_glt_of_the_alt_protocol_has_classes_of_one_size(tmp_path):
    made.write_glt(tmp_path)
    file, images = tmp_path / "annotation.json", tmp_path / "images"
    assert len(READERS["glt"](file, images=images, protocol="alt")["train"]) == 6
    found = json.loads(file.read_text())
    labels = found["train"]["label"]
    for key in list(labels)[1:]:
        labels[key] = "0"
    labels[next(iter(labels))] = "1"
    file.write_text(json.dumps(found))
    READERS["glt"](file, images=images, protocol="glt")
    with pytest.raises(ValueError, match="classes of one size.*got 1 to 5 images.*ALT's own"):
        READERS["glt"](file, images=images, protocol="alt")


@pytest.mark.parametrize("with_paths", [False, True])
def test_glt(tmp_path, with_paths):
    made.write_glt(tmp_path, with_paths)
    file = tmp_path / "annotation.json"
    parts = READERS["glt"](file, images=tmp_path / "images")
    assert parts["train"].class_names == ("n01", "n02")
    assert parts["train"].labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert parts["test"].groups.tolist() == [0, 1, 2, 0, 1, 2]
    assert parts["test"].inputs[0] == tmp_path / "images/n01/test_bbl_0.JPEG"
    parts = READERS["glt"](file, images=tmp_path / "images", protocol="clt")
    assert parts["test"].inputs[0].name == "test_bl_0.JPEG"
    with pytest.raises(ValueError, match="protocol: expected one of 'clt'"):
        READERS["glt"](file, protocol="blt")


# Damage: what is done to the files, and what the message must name.


def truncate(name, keep=-1):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:keep])

    return damage


def empty(name):
    return truncate(name, 0)


def remove(name):
    return lambda folder: (folder / name).unlink()


def array(name, change):
    def damage(folder):
        with np.load(folder / FEATURES) as loaded:
            arrays = dict(loaded)
        with np.errstate(all="ignore"):
            arrays[name] = change(arrays[name])
        kept = {key: values for key, values in arrays.items() if values is not None}
        np.savez(folder / FEATURES, **kept)

    return damage


def garble(name):
    return lambda folder: (folder / name).write_bytes(b"\xff\xfe\x00garbage" * 9)


def replace_text(name, old, new, count=1):
    def damage(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, count))

    return damage


def repickle(name, change):
    def damage(folder):
        content = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        change(content)
        (folder / name).write_bytes(made.as_python_2(content))

    return damage


def rejson(change):
    def damage(folder):
        content = json.loads((folder / "annotation.json").read_text())
        change(content)
        (folder / "annotation.json").write_text(json.dumps(content))

    return damage


def set_label(value):
    def change(content):
        content[b"labels"][7] = value

    return change


def one_class_less(content):
    content[b"labels"] = [0 if label == 4 else label for label in content[b"labels"]]


def overwrite(name, place, value):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] = value
        (folder / name).write_bytes(content)

    return damage


def regzip(name, change):
    def damage(folder):
        content = bytearray(gzip.decompress((folder / name).read_bytes()))
        (folder / name).write_bytes(gzip.compress(bytes(change(content))))

    return damage


def byte_set(place, value):
    def change(content):
        content[place] = value
        return content

    return change


def remove_class(folder):
    for image in (folder / "test/dog").iterdir():
        image.unlink()


def extra_class(folder):
    (folder / "val/bird").mkdir()


def remove_folder(folder):
    remove_class(folder)
    (folder / "test/dog").rmdir()


def every_batch(*damages):
    return lambda folder: [damage(folder) for damage in damages]


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
LIST, TABLE = "ImageNet_LT_train.txt", "metadata.csv"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
COMMENTS = "all_data_with_identities.csv"
FEATURES = "features.npz"

DAMAGE = [
    ("cifar10", remove("data_batch_3"), "data_batch_3: expected a file, got nothing"),
    ("cifar10", empty("test_batch"), "test_batch: expected a file with content"),
    ("cifar10", truncate("data_batch_2", -100), "data_batch_2: expected a pickle of CIFAR"),
    ("cifar10", garble("data_batch_2"), "data_batch_2: expected a pickle of CIFAR"),
    ("cifar10", repickle("data_batch_1", set_label(10)), r"data_batch_1, image 7: .* got 10"),
    ("cifar10", repickle("data_batch_1", lambda c: c.pop(b"labels")), "data_batch_1: .*labels"),
    ("cifar10", repickle("data_batch_1", lambda c: c.pop(b"data")), "data_batch_1: .*data"),
    (
        "cifar10",
        repickle("data_batch_5", lambda c: c.update(data=c.pop(b"data")[:, :3000])),
        "data_batch_5: expected 3072 bytes",
    ),
    ("cifar10", repickle("test_batch", one_class_less), "test, got none of name4"),
    ("cifar10", repickle("batches.meta", lambda c: c[b"label_names"].pop()), "10 class names"),
    ("cifar10-bin", truncate("data_batch_4.bin"), "data_batch_4.bin: expected records of 3073"),
    ("cifar10-bin", truncate("data_batch_4.bin", -3073), "data_batch_4.bin: expected 20 images"),
    ("cifar10-bin", overwrite("data_batch_1.bin", 3073, 17), "data_batch_1.bin, image 1: .* 17"),
    ("cifar10-bin", remove("batches.meta.txt"), "batches.meta.txt: expected a file, got nothing"),
    ("cifar10-bin", empty("test_batch.bin"), "test_batch.bin: expected a file with content"),
    ("cifar100", remove("test"), "test: expected a file, got nothing"),
    ("cifar100", truncate("train", 5000), "train: expected a pickle of CIFAR"),
    ("cifar100", repickle("train", lambda c: c.pop(b"fine_labels")), "train: .*fine_labels"),
    ("cifar100", repickle("train", lambda c: c[b"fine_labels"].pop()), "and 199 labels"),
    ("cifar100", remove("meta"), "meta: expected a file, got nothing"),
    ("folder", remove_class, "test/dog: expected images, got none"),
    ("folder", remove_folder, "test/dog: expected the images of class 'dog', got nothing"),
    ("folder", extra_class, "val/bird: expected the classes of the training images"),
    ("folder", empty("train/cat/0001.jpg"), "0001.jpg, got an empty file"),
    ("folder", truncate("train/cat/0002.jpg", 300), "0002.jpg: expected an image"),
    ("folder", garble("val/dog/0000.jpg"), "val/dog/0000.jpg: expected an image"),
    ("lists", remove("ImageNet_LT_train.txt"), "_train.txt: expected the list"),
    ("lists", empty(LIST), "ImageNet_LT_train.txt: expected a file with content"),
    ("lists", remove("train/n01440762/im age_2.JPEG"), "_train.txt, line 3: .* no such file"),
    ("lists", empty("train/n01440762/im age_2.JPEG"), "_train.txt, line 3: .* an empty file"),
    ("lists", replace_text(LIST, "_3.JPEG 0", "_3.JPEG x"), "_train.txt, line 4: .*'x'"),
    ("lists", replace_text(LIST, "_3.JPEG 0", "_3.JPEG -1"), "_train.txt, line 4: .*-1"),
    ("lists", replace_text("ImageNet_LT_val.txt", "_1.JPEG 1", "_1.JPEG 3"), "_val.txt, line 2"),
    ("lists", replace_text(LIST, ".JPEG 1", ".JPEG 0", 2), "none of 1"),
    ("lists", replace_text(LIST, "im age_3.JPEG 0\n", "\n"), "_train.txt, line 4"),
    ("lists", truncate(LIST, -3), "_train.txt, line 6: expected a path and a label"),
    ("lists", replace_text(LIST, "im age_3", "im age_0"), "_train.txt, line 4: expected each"),
    ("lists", garble(LIST), "_train.txt, line 1: expected UTF-8 text"),
    ("mnist", remove("t10k-labels-idx1-ubyte.gz"), "t10k-labels-idx1-ubyte: .* got nothing"),
    ("mnist", empty(TRAIN_IMAGES), "train-images.*: expected a file with content"),
    ("mnist", truncate(TRAIN_IMAGES, -50), "train-images.*: expected a whole gzip file"),
    ("mnist", garble(TRAIN_IMAGES), "train-images.*: expected a whole gzip file"),
    ("mnist", regzip(TRAIN_IMAGES, byte_set(3, 1)), "train-images.* starts 00000803, got 00000801"),
    ("mnist", regzip(TRAIN_IMAGES, lambda c: c[:-9]), r"train-images.*\(40, 28, 28\) bytes"),
    ("mnist", regzip(TRAIN_IMAGES, lambda c: c[:6]), "train-images.* in 6 bytes"),
    ("mnist", regzip(TRAIN_LABELS, byte_set(10, 12)), "train-labels.*, label 2: .* got 12"),
    ("waterbirds", remove(TABLE), "metadata.csv: expected the table"),
    ("waterbirds", empty(TABLE), "metadata.csv: expected a file with content"),
    ("waterbirds", replace_text(TABLE, "place,", "spot,"), "line 1: .* got none of place"),
    ("waterbirds", replace_text(TABLE, "jpg,0,0,1", "jpg,2,0,1"), "line 3: expected y, 0"),
    ("waterbirds", replace_text(TABLE, "jpg,0,0,1", "jpg,0,3,1"), "line 3: expected split"),
    ("waterbirds", replace_text(TABLE, "jpg,0,0,1", "jpg,0,0,"), "line 3: expected place.*''"),
    ("waterbirds", remove("0.Bird/Bird_1_0.jpg"), "line 6: .*Bird_1_0.jpg, got no such file"),
    ("waterbirds", truncate(TABLE, -40), "metadata.csv, line 13: expected"),
    ("waterbirds", truncate(TABLE, 100), "metadata.csv"),
    ("celeba", remove(ATTRIBUTES), "list_attr_celeba.txt: expected the table of attributes"),
    ("celeba", empty(PARTITION), "list_eval_partition.txt: expected a file with content"),
    ("celeba", truncate(ATTRIBUTES, -20), "list_attr_celeba.txt: expected 12 images"),
    ("celeba", replace_text(ATTRIBUTES, "Blond_Hair", "Hair"), "line 2: .* got no Blond_Hair"),
    ("celeba", replace_text(ATTRIBUTES, "000002.jpg -1 -1", "000002.jpg -1 -2"), "line 4: .*-2"),
    ("celeba", replace_text(ATTRIBUTES, "000002.jpg -1", "000002.jpg"), "line 4: .* 3 fields"),
    ("celeba", replace_text(ATTRIBUTES, "000003.jpg", "000002.jpg"), "line 5: .*000002.jpg again"),
    ("celeba", replace_text(PARTITION, "000002.jpg 0", "000002.jpg 4"), "line 2: .* got '4'"),
    ("celeba", replace_text(PARTITION, "000002.jpg 0\n", ""), "line 4: .* got 000002.jpg"),
    ("celeba", remove("img_align_celeba/000004.jpg"), "line 6: .* got no such file"),
    ("civilcomments", remove(COMMENTS), "identities.csv: expected the table"),
    ("civilcomments", empty(COMMENTS), "identities.csv: expected a file with content"),
    ("civilcomments", truncate(COMMENTS, -30), "identities.csv, line"),
    ("civilcomments", truncate(COMMENTS, -60), "identities.csv, line"),
    ("civilcomments", replace_text(COMMENTS, "muslim", "islam"), "line 1: .* none of muslim"),
    ("civilcomments", replace_text(COMMENTS, "train", "tain"), "line 3: expected split train"),
    ("civilcomments", replace_text(COMMENTS, ",0.6,", ",1.6,"), "line 7: expected toxicity"),
    ("civilcomments", replace_text(COMMENTS, ",0.6,", ",nan,"), "line 7: expected toxicity"),
    ("civilcomments", replace_text(COMMENTS, ",0.6,", ",much,"), "line 7: expected toxicity"),
    ("civilcomments", replace_text(COMMENTS, "val", "test", 4), "expected comments of validation"),
    ("features", remove(FEATURES), "features.npz: expected a file, got nothing"),
    ("features", empty(FEATURES), "features.npz: expected a file with content"),
    ("features", truncate(FEATURES, -40), "features.npz: expected an .npz"),
    ("features", garble(FEATURES), "features.npz: expected an .npz"),
    ("features", array("test_labels", lambda labels: None), "arrays with test_labels"),
    ("features", array("test_labels", lambda labels: labels + 1), "test_labels: .* got 1 to 3"),
    ("features", array("train_labels", lambda labels: labels[1:]), "train_labels: expected 6 "),
    ("features", array("test_inputs", lambda inputs: inputs[:, 1:]), r"floats \(N, 4\), got .*3\)"),
    ("features", array("train_inputs", lambda inputs: inputs / 0), "finite numbers, got .* row 0"),
    ("glt", remove("annotation.json"), "annotation.json: expected a file, got nothing"),
    ("glt", empty("annotation.json"), "annotation.json: expected a file with content"),
    ("glt", truncate("annotation.json", -30), "annotation.json, line 1: expected json"),
    ("glt", rejson(lambda c: c.pop("id2cat")), "annotation.json, id2cat: expected a name"),
    ("glt", rejson(lambda c: c["id2cat"].pop("0")), "id2cat: expected names of classes 0 to 0"),
    ("glt", rejson(lambda c: c.pop("test_bbl")), "test_bbl: expected a section with label"),
    ("glt", rejson(lambda c: c["val"].update(label={})), "val: expected images, got none"),
    ("glt", rejson(lambda c: c["val"].pop("attribute")), "val, .*: expected its attribute"),
    (
        "glt",
        rejson(lambda c: c["train"]["label"].update({"/data4/imagenet/train/n01/train_2.JPEG": 2})),
        r"train, .*train_2.JPEG: expected a label in \[0, 2\), got 2",
    ),
    (
        "glt",
        rejson(lambda c: c["train"]["label"].update(dict.fromkeys(c["train"]["label"], 0))),
        "none of n02",
    ),
    ("glt", remove("images/n01/val_2.JPEG"), "val: .*val_2.JPEG, got no such file"),
]

WRITERS = {
    "cifar10": made.write_cifar,
    "cifar10-bin": lambda folder: made.write_cifar(folder, binary=True),
    "cifar100": lambda folder: made.write_cifar(folder, 100),
    "folder": made.write_folder,
    "lists": made.write_lists,
    "mnist": made.write_mnist,
    "waterbirds": made.write_waterbirds,
    "celeba": made.write_celeba,
    "civilcomments": made.write_civilcomments,
    "glt": made.write_glt,
    "features": made.write_features,
}


def read(name, folder):
    if name == "glt":
        return READERS["glt"](folder / "annotation.json", images=folder / "images")
    return READERS[name.removesuffix("-bin")](folder / FEATURES if name == "features" else folder)


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_told_by_file_and_line(tmp_path, name, damage, message):
    folder = WRITERS[name](tmp_path)
    read(name, folder)
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read(name, folder)
    assert "expected" in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(READERS) - {*BUNDLED, "own"}))  # own: test_own_data.py
def test_each_reader_has_at_least_five_kinds_of_damage(name):
    assert sum(case[0] == name for case in DAMAGE) >= 5


@pytest.mark.parametrize("name", WRITERS)
def test_a_path_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="expected"):
        read(name, tmp_path / "nowhere")
    if name not in ("glt", "features"):
        with pytest.raises(OSError, match="expected"):
            read(name, tmp_path)
