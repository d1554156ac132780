"""What `python tests/stress_torchrun.py` counts and keeps."""

import os

import pytest

from iada.cli import main
from tests import stress_torchrun


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The arguments of each run, which is played: the fourth aborts, the fifth writes nothing."""
    runs = []
    results = {"train": "out/result.json", "paper": "out/table/row/record.json"}

    def play(arguments, logs):
        runs.append(arguments)
        (logs / "0").mkdir(parents=True)
        (logs / "0" / "stderr.log").write_text("terminate called")
        result = results.get(arguments[2] if arguments[0] == "-m" else "")
        if result is not None and len(runs) != 5:
            path = logs.parent / result
            path.parent.mkdir(parents=True)
            path.write_text("{}")
        return {1: -6} if len(runs) == 4 else {}

    monkeypatch.setattr(stress_torchrun, "launch", play)
    monkeypatch.setattr(stress_torchrun.tempfile, "tempdir", str(tmp_path))
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # so that both are put back
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return runs


def test_runs_that_end_well_leave_nothing(launched, tmp_path, capsys):
    assert stress_torchrun.main(["--runs", "3", "--busy", "0"]) == 0
    assert [arguments[:3] for arguments in launched[1:]] == [
        ["-m", "iada", "train"],
        ["-m", "iada", "paper"],
    ]
    assert list(tmp_path.iterdir()) == []
    assert "3 runs, 0 ended badly" in capsys.readouterr().out


def test_runs_that_end_badly_are_counted_and_kept(launched, tmp_path, capsys):
    assert stress_torchrun.main(["--runs", "6", "--busy", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    aborted, empty = sorted(tmp_path.iterdir())
    said = f"run 4, script: exit codes by rank {{1: -6}}; its logs are kept in {aborted}"
    assert said in lines
    assert f"run 5, iada train: 0 results; its logs are kept in {empty}" in lines
    assert "  0: terminate called" in lines
    assert lines[-3:] == [
        "script: 2 runs, 1 ended badly",
        "iada train: 2 runs, 1 ended badly",
        "iada paper: 2 runs, 0 ended badly",
    ]


def test_what_computes_beside_them_ends_with_them():
    with stress_torchrun.load(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode is not None for process in started)


def test_the_configuration_trains(tmp_path):
    assert main(stress_torchrun.commands(tmp_path)["iada train"][2:]) == 0
    assert (tmp_path / "out" / "result.json").exists()
