"""The benchmark's own machinery, at small sizes, see test_speed.py for pytest-benchmark's view."""

import datetime
import json

import pytest
import torch

from bench import classes, cpu, first_use, labels
from bench.__main__ import timed_row
from bench.measuring.memory import peak_bytes
from bench.measuring.shapes import IGNORED, SHAPES, make_problem
from bench.measuring.timing import interleave, ratio
from iada_kernels import native
from iada_kernels.environment import environment, source_commit


def test_sides_take_turns():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    taken = interleave(sides, rounds=4, seconds=0.0)
    assert {name: len(rounds) for name, rounds in taken.items()} == {"a": 4, "b": 4}
    assert calls[-4:] == ["a", "b", "a", "b"]
    assert ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0


def test_peak_memory_sees_what_is_freed_again():
    megabytes = 2**20 * 64

    def call():
        torch.ones(megabytes // 4)
        return torch.ones(megabytes // 4)

    call()
    assert 0.9 * megabytes < peak_bytes(call) < 2.5 * megabytes


@pytest.mark.parametrize("name", ["cifar10-r32", "subpop-r50", "civil-bert"])
def test_problems_repeat_and_are_skewed(name):
    one, other = make_problem(SHAPES[name]), make_problem(SHAPES[name])
    assert torch.equal(one.features, other.features)
    counts = torch.bincount(one.labels[one.labels != IGNORED])
    assert counts[0] > counts[-1]
    assert (one.covariance.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.usefixtures("one_thread")
def test_tables_name_versions_machine_and_backend(monkeypatch, capsys, tmp_path):
    written = tmp_path / "figures.json"
    small = ["--samples", "4", "--classes", "5", "--features", "3", "--rounds", "1"]
    monkeypatch.setattr(first_use, "swapped", lambda method, seed: 90.0)
    monkeypatch.setattr(first_use, "configured", lambda method, seed: 80.0 + seed)
    monkeypatch.setattr(labels, "one", lambda *arguments: {"forgetting": 0.5})
    for main, arguments in (
        (classes.main, small),
        (labels.main, ["--seeds", "1"]),
        (first_use.main, ["--seeds", "2", "--json", str(written)]),
    ):
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        assert not main()
        first, second = capsys.readouterr().out.split("\n")[:2]
        assert first.startswith("iada ")
        assert second.endswith(f" = {environment()['backend']}")
    record = json.loads(written.read_text())
    assert record["balanced_accuracy"]["toml meta-iada"] == [80.0, 81.0]
    assert record["machine"] == environment()
    assert record.get("commit", "") == source_commit()
    assert datetime.date.fromisoformat(record["date"])


def test_a_row_of_the_table():
    row = timed_row("cifar10-r32", rounds=3)
    assert row["eager_by_fused"] > 0
    assert row["eager_ms"] > 0


def test_the_sides_of_many_classes_have_the_same_gradients():
    sides = classes.sides_of(samples=7, classes=30, width=5, chunk=3)
    for ours, theirs in zip(sides["fused"](), sides["chunked"](), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(sides["epsilon"]()) == 3
    assert len(sides["diag"]()) == 2


@pytest.mark.skipif(not native.is_available(), reason="no native library here")
def test_rows_of_the_table_of_the_cpu():
    row = cpu.timed_row("civil-bert", rounds=3)
    assert row["eager_by_native"] > 0
    assert row["shape"] in cpu.table_row(row)
    meta = cpu.timed_meta_row("cifar10-r32", rounds=3)
    assert meta["hypergradient_torch_by_native"] > 0
    assert meta["characteristics_torch_by_native"] > 0
    assert meta["shape"] in cpu.meta_table_row(meta)
