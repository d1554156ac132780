"""Tiny data sets written in the true formats of the published ones."""

import csv
import gzip
import io
import json
import pickle
import struct

import numpy as np
from PIL import Image


def write_image(path, size=(8, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def cifar_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as the str of Python 2, in which CIFAR is published."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        text = value.encode() if isinstance(value, str) else value
        short = len(text) < 256
        self.write(b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text)))
        self.write(text)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def as_python_2(value):
    """What cPickle of Python 2 writes, arrays under the module that numpy had them in."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(folder, classes=10, binary=False, per_class=2):
    """Every batch has `per_class` images of each class."""
    fine = classes == 100
    place = folder / f"cifar-{classes}{'' if fine else '-batches'}-{_version(binary, fine)}"
    place.mkdir(parents=True)
    names = [f"name{c}" for c in range(classes)]
    batches = (
        ["train", "test"] if fine else [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    )
    for seed, batch in enumerate(batches):
        labels = list(range(classes)) * per_class
        images = cifar_images(len(labels), seed)
        if binary:
            head = np.array([[c // 5, c] if fine else [c] for c in labels], dtype=np.uint8)
            (place / f"{batch}.bin").write_bytes(np.concatenate([head, images], axis=1).tobytes())
        else:
            key = b"fine_labels" if fine else b"labels"
            content = {b"data": images, key: labels, b"batch_label": batch.encode()}
            (place / batch).write_bytes(as_python_2(content))
    if binary:
        text = "fine_label_names.txt" if fine else "batches.meta.txt"
        (place / text).write_text("\n".join(names) + "\n\n")
    else:
        key = b"fine_label_names" if fine else b"label_names"
        meta = as_python_2({key: [name.encode() for name in names]})
        (place / ("meta" if fine else "batches.meta")).write_bytes(meta)
    return place


def _version(binary, fine):
    if binary:
        return "binary" if fine else "bin"
    return "python" if fine else "py"


def write_folder(folder, parts=("train", "val", "test"), size=(8, 8), suffix=".jpg"):
    for part in parts:
        for name in ("cat", "dog"):
            for number in range(3):
                write_image(folder / part / name / f"{number:04}{suffix}", size, number)
    return folder


def write_lists(folder, stem="ImageNet_LT"):
    for part in ("train", "val", "test"):
        lines = []
        for number in range(6):
            name = f"{part}/n0144076{number % 3}/im age_{number}.JPEG"
            write_image(folder / name, seed=number)
            lines.append(f"{name} {number % 3}")
        (folder / f"{stem}_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_mnist(folder, count=40, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        images = np.random.default_rng(0).integers(1, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            head = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            content = head + array.tobytes()
            name = f"{stem}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_waterbirds(folder):
    rows = []
    for split in range(3):
        for bird in range(2):
            for place in range(2):
                name = f"{bird}.Bird/Bird_{split}_{place}.jpg"
                write_image(folder / name)
                rows.append([len(rows) + 1, name, bird, split, place, "/b/bamboo_forest/1.jpg"])
    header = ["img_id", "img_filename", "y", "split", "place", "place_filename"]
    write_csv(folder / "metadata.csv", header, rows)
    return folder


def write_celeba(folder, as_csv=False):
    names = ["5_o_Clock_Shadow", "Blond_Hair", "Male"]
    rows, splits = [], []
    for split in range(3):
        for hair in (-1, 1):
            for male in (-1, 1):
                image = f"{len(rows) + 1:06}.jpg"
                write_image(folder / "img_align_celeba" / image)
                rows.append([image, -1, hair, male])
                splits.append([image, split])
    if as_csv:
        write_csv(folder / "list_attr_celeba.csv", ["image_id", *names], rows)
        write_csv(folder / "list_eval_partition.csv", ["image_id", "partition"], splits)
    else:
        lines = [f"{image} {a:2d} {b:2d} {c:2d}" for image, a, b, c in rows]
        text = "\n".join([str(len(rows)), " ".join(names) + " ", *lines])
        (folder / "list_attr_celeba.txt").write_text(text + "\n")
        text = "\n".join(f"{image} {split}" for image, split in splits)
        (folder / "list_eval_partition.txt").write_text(text + "\n")
    return folder


IDENTITIES = ["male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white"]


def write_civilcomments(folder, copies=1):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for split in ("train", "val", "test"):
        for toxicity in (0.0, 0.6):
            for mention in (0.0, 0.5) * copies:
                text = f'A comment, with "quotes"\nand a line, {len(rows)}'
                values = [mention, 0.2, 0, 0, 0, 0, mention, 0]
                rows.append([len(rows), 1000 + len(rows), split, text, toxicity, *values])
    header = ["", "id", "split", "comment_text", "toxicity", *IDENTITIES]
    write_csv(folder / "all_data_with_identities.csv", header, rows)
    return folder


def write_glt(folder, with_paths=False):
    """ImageNet-GLT has paths as keys and labels as strings, MSCOCO-GLT ids and a table of paths."""
    found = {
        "cat2id": {"n01": "0", "n02": "1"},
        "id2cat": {"0": "n01", "1": "n02"},
    }
    for part in ("train", "val", "test_lt", "test_bl", "test_bbl"):
        section = {"label": {}, "frequency": {}, "attribute": {}}
        for number in range(6):
            name = f"n0{number % 2 + 1}/{part}_{number}.JPEG"
            write_image(folder / "images" / name)
            path = f"/data4/imagenet/train/{name}"
            key = str(number) if with_paths else path
            section["label"][key] = number % 2 if with_paths else str(number % 2)
            section["frequency"][key] = 0
            section["attribute"][key] = number % 3
            if with_paths:
                section.setdefault("path", {})[key] = path
        found[part] = section
    (folder / "annotation.json").write_text(json.dumps(found))
    return folder


def write_features(folder, width=4, per_class=2):
    """Features of three classes in one .npz."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), per_class)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_inputs"] = rng.normal(size=(len(labels), width)).astype(np.float32)
        arrays[f"{part}_labels"] = labels
    np.savez(folder / "features.npz", **arrays)
    return folder
