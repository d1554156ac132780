"""Features computed once, and heads trained on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.frozen import KEPT, ROWS, collected, settings_digest, table
from iada.cli import main
from iada.experiments.datasets import Labelled, read_features
from iada.experiments.datasets.features import write_features
from iada.experiments.recipe import load
from iada.experiments.records import read_records
from iada.experiments.scenarios import long_tail
from iada.models import build_backbone
from iada.training.config import with_defaults
from tests.helpers.paper_runs import write_images

CLASSES = tuple("abc")


def parts(rows=9, width=4):
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(3 * count) % 3
        features = torch.randn(3 * count, width, generator=generator)
        features[torch.arange(3 * count), labels] += 3
        return Labelled(features, labels, CLASSES)

    return {"train": part(rows), "test": part(4)}


def test_features_come_back(tmp_path):
    given = parts()
    write_features(tmp_path / "f.npz", given, {"model": "x"})
    read = read_features(tmp_path / "f.npz")
    assert set(read) == {"train", "test"}
    for name, part in given.items():
        assert torch.equal(read[name].inputs, part.inputs)
        assert torch.equal(read[name].labels, part.labels)
        assert read[name].class_names == CLASSES
    np.savez(tmp_path / "own.npz", **{f"{n}_inputs": p.inputs for n, p in given.items()})
    with pytest.raises(ValueError, match=r"own\.npz: expected arrays with train_labels"):
        read_features(tmp_path / "own.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"bad\.npz: expected an \.npz of features"):
        read_features(tmp_path / "bad.npz")


def test_the_command_computes_what_the_backbone_gives(tmp_path, capsys):
    pytest.importorskip("PIL.Image")
    images = write_images(tmp_path / "images")
    torch.manual_seed(0)
    backbone, _ = build_backbone("resnet8", 10)
    torch.save({"backbone": backbone.state_dict()}, tmp_path / "weights.pt")
    command = [
        "features",
        "--recipe",
        "table2/cifar10-100",
        "--data",
        str(images),
        "--device",
        "cpu",
    ]
    command += ["--out", str(tmp_path / "f.npz"), "--test-limit", "1"]
    command += ["--set", "data.reader=folder", "model.backbone=resnet8"]
    assert main(command) == 2
    assert "--weights: expected a file" in capsys.readouterr().err
    assert main([*command, "--weights", str(tmp_path / "weights.pt")]) == 0
    read = read_features(tmp_path / "f.npz")
    assert read["train"].inputs.shape == (120, 64)
    assert read["test"].class_counts().tolist() == [1] * 10
    with np.load(tmp_path / "f.npz") as arrays:
        about = json.loads(str(arrays["about"]))
    assert about["model"]["weights"] == str(tmp_path / "weights.pt")
    from PIL import Image

    pixels = np.array(Image.open(images / "train/class0/0.png")).transpose(2, 0, 1)
    mean, deviation = (
        np.array(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    )
    image = torch.tensor((pixels / 255 - mean) / deviation).float()
    backbone.eval()
    torch.testing.assert_close(
        read["train"].inputs[:1], backbone(image[None]).detach(), rtol=1e-4, atol=1e-4
    )


def test_every_method_trains_a_head(tmp_path):
    write_features(tmp_path / "f.npz", parts(rows=40), {})
    command = [
        "paper",
        "--table",
        "frozen",
        "--row",
        "cifar10-100",
        "--device",
        "cpu",
        "--seed",
        "1",
    ]
    command += ["--data", str(tmp_path / "f.npz"), "--out", str(tmp_path / "runs"), "--epochs", "2"]
    command += ["--set", "scenario.ratio=4", "scenario.meta_per_class=10", "trainer.batch_size=20"]
    command += ["trainer.meta_batch_size=10", "--evaluate-every", "2", "--methods"]
    entries = load("frozen/cifar10-100").methods
    plain = [entry.key for entry in entries if not entry.key.startswith("meta-iada-")]
    assert main([*command, *plain, "meta-iada-alpha-0.1", "meta-iada-meta-per-class-2"]) == 0
    records = {record["method"]: record for record in read_records([tmp_path / "runs"])}
    assert set(plain) < set(records)
    for record in records.values():
        assert record["last"]["top1"] > 0.5
        assert sum(record["reliability"]["count"]) == 12
    assert records["meta-iada-alpha-0.1"]["settings"]["alpha"] == 0.1
    small = records["meta-iada-meta-per-class-2"]
    assert small["split"]["class_counts"]["meta"] == [2] * 3
    assert records["meta-iada"]["split"]["class_counts"]["meta"] == [10] * 3
    with_meta = records["ce-with-meta"]["class_counts"]
    assert with_meta == [count + 10 for count in records["ce"]["class_counts"]]


def test_smaller_meta_sets_are_parts_of_larger_ones():
    split = long_tail(parts(rows=40), ratio=4, meta_per_class=10, seed=0)
    few, more = split.with_meta_limit(2), split.with_meta_limit(5)
    assert few.meta.class_counts().tolist() == [2] * 3
    assert set(few.rows["meta"].tolist()) < set(more.rows["meta"].tolist())
    assert torch.equal(few.train.labels, split.train.labels)
    without = long_tail(parts(rows=40), ratio=4, meta_per_class=0, seed=0)
    with pytest.raises(ValueError, match="meta_per_class: expected a meta set"):
        without.with_meta_limit(2)


# The files of results, and how the keys of arms begin that were not run of it.
LEFT_OUT = ("meta-iada-without-characteristics", "learned-covariance")
FROZEN = {"frozen": (), "frozen-epoch39": LEFT_OUT}


def plain(settings):
    return json.loads(json.dumps(settings))


@pytest.mark.parametrize("name", FROZEN)
def test_the_page_shows_the_committed_results(name):
    root = Path(__file__).parents[2]
    records = json.loads((root / f"bench/results/{name}.json").read_text())
    assert table(records) in (root / "docs/frozen-features.md").read_text()
    for row in ROWS:
        runs = {(r["method"], r["seed"]) for r in records if r["experiment"] == row}
        keys = [e.key for e in load(row).methods if not e.key.startswith(FROZEN[name])]
        assert runs == {(key, seed) for key in keys for seed in range(1, 11)}


@pytest.mark.parametrize("name", FROZEN)
def test_the_committed_results_are_of_the_recipes(name):
    root = Path(__file__).parents[2]
    entries = {(row, e.key): e for row in ROWS for e in load(row).methods}
    digests = {}
    for record in json.loads((root / f"bench/results/{name}.json").read_text()):
        arm = record["experiment"], record["method"]
        entry = entries[arm]
        if arm not in digests:
            digests[arm] = settings_digest(record["settings"])
            used = {**with_defaults(record["settings"]), "seed": entry.trainer.seed}
            assert plain(used) == plain(entry.trainer.settings()), entry.title
        assert record["settings_digest"] == digests[arm], entry.title
        used = None if entry.with_meta else 10 * (entry.meta_per_class or 100)
        assert record["meta_images"] == used, entry.title


def test_what_eq_9_moved_is_as_the_pages_say():
    root = Path(__file__).parents[2]
    records = json.loads((root / "bench/results/frozen.json").read_text())
    found = {}
    for method in ("meta-iada", "metasaug", "learned-covariance"):
        runs = [r for r in records if r["method"] == method]
        assert len(runs) == 20
        first = [r["covariance_change"] for r in runs]
        least, most = zip(*(r["covariance_change_later"] for r in runs), strict=True)
        found[method] = [min(first), max(first), min(least), max(most)]
    assert found == {
        "meta-iada": pytest.approx([2e-7, 4.6e-6, 3e-11, 1.6e-7], rel=0.1),
        "metasaug": pytest.approx([1.8e-5, 2.2e-4, 8e-8, 4.3e-5], rel=0.1),
        "learned-covariance": pytest.approx([2e-4, 4.6e-3, 1.8e-5, 1.4e-4], rel=0.1),
    }
    page = (root / "docs/frozen-features.md").read_text()
    for figure in ("2e-7 to 5e-6", "1.6e-7", "2e-5 to 2e-4", "8e-8 to 4e-5", "2e-4 to 5e-3"):
        assert figure in page


def test_runs_are_collected_as_they_are(tmp_path):
    settings = {"seed": 3, "method": "ce", "lr": 0.1}
    record = dict.fromkeys(KEPT)
    record |= {"experiment": ROWS[0], "method": "ce", "method_name": "CE", "settings": settings}
    record["split"] = {"class_counts": {"meta": [10, 10]}}
    changes = (0.25, 0.125, 0.0625)
    record["curve"] = [{}, *({"covariance_change": change} for change in changes)]
    for method, name, score, seed in (
        ("ce", "CE", 0.6, 1), ("ce", "CE", 0.7, 2),
        ("meta-iada", "Meta-IADA", 0.8, 1), ("meta-iada", "Meta-IADA", 0.8, 2),
    ):  # fmt: skip
        own = {"seed": seed, "last": {"top1": score}, "method": method, "method_name": name}
        path = tmp_path / method / str(seed) / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record | own))
    found = collected(tmp_path)
    assert [(r["method"], r["seed"]) for r in found] == [
        ("ce", 1), ("meta-iada", 1), ("ce", 2), ("meta-iada", 2)
    ]  # fmt: skip
    assert {r["meta_images"] for r in found} == {20}
    assert {r["covariance_change"] for r in found} == {0.25}
    assert [r["covariance_change_later"] for r in found] == [[0.0625, 0.125]] * 4
    assert [r["seed"] for r in found if "settings" in r] == [1, 1]
    assert {r["settings_digest"] for r in found} == {settings_digest({**settings, "seed": 9})}
    assert settings_digest({**settings, "lr": 0.2}) != found[0]["settings_digest"]
    path = tmp_path / "ce" / "9" / "record.json"
    path.parent.mkdir()
    short = {"seed": 9, "last": {"top1": 0.2}, "deviations": ["2 of 40 epochs"]}
    path.write_text(json.dumps(record | short))
    with pytest.raises(ValueError, match="expected runs of one schedule, got 2 of 40 epochs; as"):
        collected(tmp_path)
    without = [r for r in found if r["method"] == "ce"]
    assert "| CE | 65.0 ± 7.1 | – |" in table(without)
    beside = [*found, {**without[0], "experiment": ROWS[1]}]  # no Meta-IADA in this row
    assert "| CE | 65.0 ± 7.1 | +15.0 ± 63.5 (p 0.205) | 60.0 | – |" in table(beside)
    text = table(found)
    assert "| CE | 65.0 ± 7.1 | +15.0 ± 63.5 (p 0.205) | – | – |" in text
    assert "| Meta-IADA | 80.0 ± 0.0 | – | – | – |" in text


def test_sweeps_change_one_setting():
    entries = {entry.key: entry for entry in load("frozen/cifar10-100").methods}
    base = entries["meta-iada"].trainer.settings()
    for key, entry in entries.items():
        if key.startswith("meta-iada-"):
            changed = {n for n, v in entry.trainer.settings().items() if v != base[n]}
            size = entry.meta_per_class != entries["meta-iada"].meta_per_class
            assert len(changed) + size == 1, key
    images = {"data": {"reader": "digits"}, "model": {"backbone": "identity"}}
    assert load("frozen/cifar10-100", images).model.backbone == "identity"
