"""`python -m bench.scaling` and the pictures, at small sizes."""

import csv
import math

import pytest

from bench import __main__ as main_bench
from bench import scaling
from bench.measuring.shapes import Shape
from tests.helpers.launch import ROOT


def test_a_sweep_writes_numbers_slopes_and_pictures(tmp_path, monkeypatch, capsys):
    options = ["--structures", "diag", "--axes", "features", "--most", "128", "--rounds", "3"]
    sides = ["--sides", "torch", "cross-entropy", "--out", str(tmp_path)]
    monkeypatch.setattr(scaling, "MIDDLE", {"diag": (8, 6, 16, 0)})
    monkeypatch.setattr("sys.argv", ["bench.scaling", *options, *sides])
    assert scaling.main() == 0
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["side"], row["A"]) for row in rows] == [
        *[("torch", "32"), ("cross-entropy", "32")],
        *[("torch", "128"), ("cross-entropy", "128")],
    ]
    assert all(float(row["ms"]) > 0 and row["processor"] for row in rows)
    assert "| diag, torch |" in capsys.readouterr().out
    pictures = {name: (tmp_path / name).read_text() for name in ("time.svg", "memory.svg")}
    assert all("cross-entropy" in picture for picture in pictures.values())
    again = tmp_path / "again"
    again.mkdir()
    arguments = ["bench.scaling", "--from", str(tmp_path / "scaling.csv"), "--out", str(again)]
    monkeypatch.setattr("sys.argv", arguments)
    assert scaling.main() == 0
    for name in pictures:
        assert (again / name).exists()


def test_the_slope_of_a_power_is_its_exponent():
    line = [{"size": size, "ms": 3.0 * size**1.5} for size in (2, 8, 32, 128)]
    assert scaling.slope(line, "ms") == pytest.approx(1.5)
    assert math.isnan(scaling.slope(line[:1], "ms"))


def test_the_cost_model_grows_as_the_mathematics():
    def model(side, structure="full", present=10, n=128, c=10, a=64):
        return scaling.multiply_adds(Shape("", n, c, a, structure), side, present)

    assert model("eager", n=256) == 2 * model("eager")
    assert model("cross-entropy", c=20) == 2 * model("cross-entropy")
    assert model("native", present=5) < model("native")
    assert model("torch", "diag", n=4, a=128) == 2 * model("torch", "diag", n=4)


def test_an_error_in_the_process_is_an_error_here():
    with pytest.raises(KeyError, match="no such side"):
        scaling.in_a_process(scaling._extra_bytes, Shape("", 4, 3, 2, "diag"), "no such side")


def test_a_picture_of_rows_measured_before(tmp_path, monkeypatch):
    picture, rows = tmp_path / "speed.svg", str(ROOT / "bench/results/cpu.json")
    monkeypatch.setattr("sys.argv", ["bench", "--plot", str(picture), "--from", rows])
    assert main_bench.main() == 0
    assert "cifar10-r32" in picture.read_text()
    monkeypatch.setattr("sys.argv", ["bench", "--from", rows])
    with pytest.raises(SystemExit):
        main_bench.main()
