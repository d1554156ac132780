"""`torchrun -m iada paper`: the processes train one run together, and write it once."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from iada.experiments.command import check_processes
from iada.experiments.recipe import load
from iada.experiments.records import read_records
from tests.helpers.launch import torchrun
from tests.helpers.paper_runs import ROW, write_images
from tests.helpers.processes import held_by_another_process

pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Two methods with a first phase in common and two epochs."""
    data = write_images(tmp_path_factory.mktemp("images"))
    return [
        "-m",
        "iada",
        *ROW,
        "--data",
        data,
        "--epochs",
        "5",
        "--methods",
        "metasaug",
        "meta-iada",
    ]


def test_two_processes_make_each_run_once(command, tmp_path):
    output = torchrun(*command, "--out", tmp_path)
    for line in ("run 1 of 2", "run 2 of 2", "84.01", "Report: "):
        assert output.count(line) == 1, line
    assert len(list(tmp_path.rglob("first-phase.pt"))) == 1
    records = sorted(read_records([tmp_path]), key=lambda record: record["method"])
    assert [record["method"] for record in records] == ["meta-iada", "metasaug"]
    for record in records:
        assert record["machine"]["processes"] == "2"
        assert np.sum(record["confusion"]) == 30
        assert [row["epoch"] for row in record["curve"]] == list(range(5))
        assert all(np.isfinite(row["loss"]) for row in record["curve"])
        assert "generalization" in record["curve"][-1]
    rows = sum(records[0]["class_counts"])
    # Counted over the rows of both, in the last epoch.
    assert sum(records[0]["epsilon"]["histogram_clean"]) == rows

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert torchrun(*command, "--out", tmp_path).count("Report: ") == 1  # nothing is run twice
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_what_is_wrong_for_the_first_is_told_once(command, tmp_path):
    folder = tmp_path / "table2/cifar10-100/metasaug/seed0"
    with held_by_another_process(folder) as other:
        error = torchrun(*command, "--out", tmp_path, code=1)
    assert error.count(f"in use by process {other}") == 1
    assert "Traceback" not in error.split("ChildFailedError")[0].split("torch/distributed")[0]


def test_methods_of_one_process_are_told_before_anything_is_run():
    recipe = load("afr-table1/cifar100-100")
    assert "cmo" in {contestant.key for contestant in recipe.methods}
    several = "ce ce-drw ldam-drw .*here"
    message = f"--methods: expected .* got cmo, .*afr.*pass --methods {several}"
    with pytest.raises(ValueError, match=message):
        check_processes([recipe], torch.device("cpu"))


def test_a_device_of_one_process_is_told():
    recipe = load("table7/cifar10-10")
    check_processes([recipe], torch.device("cuda"))
    with pytest.raises(ValueError, match="--device: expected a kind of device .* pass cuda"):
        check_processes([recipe], torch.device("cuda:1"))
