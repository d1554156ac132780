"""`paper --balance`, `--corruptions`, `--moved-features`, of finished runs on a small data set."""

import functools
import json

import numpy as np
import pytest

from iada.cli import main
from iada.experiments import moved_record
from iada.experiments.datasets.corruptions import CORRUPTIONS, SEVERITIES
from iada.experiments.diagnostics.inversion import invert
from iada.experiments.on_demand import has_epsilon
from iada.experiments.recipe import load
from tests.helpers.paper_runs import ROW, write_images

pytestmark = pytest.mark.slow

Image = pytest.importorskip("PIL.Image")
ALL = ["--balance", "--corruptions", "--moved-features"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def quick(monkeypatch):
    """Inversions of a few steps."""
    monkeypatch.setattr(moved_record, "invert", functools.partial(invert, steps=8))


def command_of(images, out, *methods):
    shorter = ["--epochs", "2", "--evaluate-every", "2"]
    return [*ROW, "--data", str(images), "--out", str(out), *shorter, "--methods", *methods]


def records_in(out):
    paths = sorted(out.rglob("record.json"))
    return {path.parts[-3]: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_finished_runs_are_measured_once(images, tmp_path, capsys, quick):
    command = command_of(images, tmp_path, "ce", "meta-iada")
    assert main(command) == 0
    assert not {"balance", "corruptions", "moved_features"} & {*records_in(tmp_path)["ce"]}
    plain = records_in(tmp_path)["meta-iada"]
    capsys.readouterr()
    assert main([*command, *ALL]) == 0
    output = capsys.readouterr().out
    assert output.count("corruptions: ") == 2
    assert output.count("balance: ") == 2
    assert output.count("moved features: 8 training samples") == 1
    records = records_in(tmp_path)
    assert "moved_features" not in records["ce"]
    ours = records["meta-iada"]
    assert {name: ours[name] for name in plain} == plain
    for record in records.values():
        found = record["corruptions"]
        assert list(found["accuracy"]) == list(CORRUPTIONS)
        assert found["amounts"]["fog"] == list(CORRUPTIONS["fog"][1])
        rows = np.array(list(found["accuracy"].values()))
        assert rows.shape == (len(CORRUPTIONS), SEVERITIES)
        assert found["mean"] == pytest.approx(rows.mean())
        assert found["clean"] == record["last"]["top1"]
        check_balance(record)
    check_moved(ours)
    page = (tmp_path / "table2/cifar10-100/index.html").read_text(encoding="utf-8")
    assert "after the paper&#39;s Fig. 5" in page
    assert page.count('<img src="data:image/png;base64,') == 8 * 9
    assert "gaussian noise" in page
    assert "logits less τ log π" in page
    assert "--corruptions --moved-features --balance" in page

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert main([*command, *ALL]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times

    (path,) = [path for path in times if "meta-iada" in str(path)]
    path.write_text(json.dumps(plain), encoding="utf-8")  # measured again, it comes out the same
    assert main([*command, *ALL]) == 0
    again = records_in(tmp_path)["meta-iada"]
    for name in ("balance", "corruptions", "moved_features"):
        assert {**again[name], "seconds": 0} == {**ours[name], "seconds": 0}


def check_balance(record):
    found, last = record["balance"], record["last"]
    at = {tau: place for place, tau in enumerate(found["tau"])}
    assert min(at) == -1
    assert max(at) == 1.5
    assert found["top1"][at[0]] == pytest.approx(last["top1"])
    assert found["balanced"][at[0]] == pytest.approx(last["balanced"])
    assert found["top1"][at[1]] == pytest.approx(last["posthoc_top1"])


def check_moved(record):
    found = record["moved_features"]
    assert len(found["radii"]) == 10
    assert found["alpha"] == 0.5
    assert len(found["samples"]) == 8
    for sample in found["samples"]:
        given, moved, *drawn = sample["targets"]
        assert [t["kind"] for t in sample["targets"]] == ["h", "h + ε s", "drawn", "drawn"]
        assert given["moved"] == pytest.approx(0, abs=1e-6)
        assert given["own_rank"] == 0
        length = abs(sample["epsilon"]) * found["width"] ** 0.5
        assert moved["moved"] == pytest.approx(length, rel=1e-3)
        for target in sample["targets"]:
            assert len(target["nearest"]) == 3
            assert sample["row"] not in [other["row"] for other in target["nearest"]]
            assert target["residual"] > 0
            assert len(target["inverted_image"]) < 5000
            assert len(target["nearest_image"]) < 5000
            assert target["residual"] >= target["below_zero"] - 1e-4


def test_an_equal_run_is_measured_by_the_checkpoint_of_the_other(images, tmp_path, quick):
    command = command_of(images, tmp_path, "meta-iada")
    assert main([*command, *ALL]) == 0
    row = ["--table", "7", "--row", "cifar10-100"]
    others = [*command[:1], *row, *command[5:]]
    assert main([*others, *ALL]) == 0
    first, second = (
        json.loads((tmp_path / f"{table}/cifar10-100/meta-iada/seed0/record.json").read_text())
        for table in ("table2", "table7")
    )
    assert second["same_as"] == "table2/cifar10-100/meta-iada/seed0"
    assert first["moved_features"]["samples"] == second["moved_features"]["samples"]


def test_a_checkpoint_that_is_gone(images, tmp_path, capsys, quick):
    command = command_of(images, tmp_path, "meta-iada")
    assert main(command) == 0
    for path in tmp_path.rglob("checkpoint*.pt"):
        path.unlink()
    assert main([*command, "--moved-features"]) == 2
    assert "expected the checkpoint of the last epoch" in capsys.readouterr().err


def test_published_files(images, tmp_path, quick):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "labels.npy", np.tile(np.arange(10).repeat(3), SEVERITIES))
    shape = (30 * SEVERITIES, 8, 8, 3)
    np.save(folder / "snow.npy", rng.integers(0, 256, shape, dtype=np.uint8))
    out = tmp_path / "out"
    command = command_of(images, out, "ce")
    assert main([*command, "--corruptions", str(folder)]) == 0
    found = records_in(out)["ce"]["corruptions"]
    assert found["source"] == "published"
    assert list(found["accuracy"]) == ["snow"]
    assert len(found["accuracy"]["snow"]) == SEVERITIES
    assert main([*command, "--corruptions"]) == 0  # another source is measured anew
    assert records_in(out)["ce"]["corruptions"]["source"] == "made"


@pytest.mark.parametrize(
    ("methods", "option", "message"),
    [
        (["ce"], ["--moved-features"], "--moved-features: expected a method with an ε, got ce"),
        (["metasaug"], ["--moved-features"], "expected a method with an ε, got metasaug"),
        (["ce"], ["--corruptions", "nowhere"], "nowhere: expected a folder with the files"),
    ],
)
def test_errors_come_before_training(methods, option, message, images, tmp_path, capsys):
    assert main([*command_of(images, tmp_path, *methods), *option]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("checkpoint.pt"))


@pytest.mark.parametrize("option", ["--corruptions", "--moved-features"])
def test_features_are_no_images(option, tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 400), ("test", 30)):
        arrays[f"{part}_inputs"] = rng.standard_normal((count, 6)).astype(np.float32)
        arrays[f"{part}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "features.npz", **arrays)
    command = ["paper", "--table", "frozen", "--row", "cifar10-100", "--device", "cpu"]
    command += ["--data", str(tmp_path / "features.npz"), "--out", str(tmp_path / "out")]
    command += ["--methods", "meta-iada", option]
    assert main(command) == 2
    assert f"{option}: expected a row whose" in capsys.readouterr().err


def test_which_methods_have_an_epsilon():
    entries = {entry.key: entry for entry in load("controls/cifar10-100").methods}
    having = {key for key, entry in entries.items() if has_epsilon(entry)}
    assert {"meta-iada", "untrained", "zero-start", "constant-0.1"} <= having
    assert not {"ce", "deferred-la", "metasaug", "deferred-la-g"} & having
