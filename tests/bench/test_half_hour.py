"""`bench.gpu --full` without a GPU: how stages end and go on, and all of it with stubs."""

import argparse
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.gpu import half_hour
from bench.gpu.half_hour import Stage, run_stage, slowest
from bench.tiles import changes, record_of
from iada_kernels.triton.config import NVIDIA, Tile

pytestmark = pytest.mark.slow
# A command that has come to its end, three tools watch the same one, is not run again.
STUB = """#!{python}
import pathlib, subprocess, sys
stub, command = pathlib.Path(sys.argv[0]), sys.argv[sys.argv.index({python!r}):]
print("watched by", stub.name)
done = stub.with_name("done")
if repr(command) not in (done.read_text().splitlines() if done.exists() else []):
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)
    with done.open("a") as file:
        print(command, file=file)
"""


def python(code):
    return (sys.executable, "-c", code)


def options_for(folder, **changed):
    given = {"out": folder, "dry_run": True, "seconds": 60.0, "again": [], "data": None}
    return argparse.Namespace(**(given | changed))


def test_how_a_stage_ends(tmp_path):
    def state(code, seconds=20.0, **options):
        return run_stage(Stage("one", python(code), 0, 0, **options), tmp_path, seconds)

    ended = state("print('right')")
    assert (ended["state"], ended["code"], ended["output"]) == ("done", 0, "right\n")
    assert state("raise SystemExit('wrong')")["state"] == "failed"
    assert state("", tool="no-such-program")["state"] == "not here"
    assert state("print('a\\nleft out: b')", goes_on=True)["state"] == "stopped"
    assert state("print('a\\nleft out: b')")["state"] == "done"
    begun = "import time; print('begun', flush=True); time.sleep(600)"
    ended = state(begun, seconds=5.0)
    assert (ended["state"], ended["code"], ended["output"]) == ("stopped", None, "begun\n")


def test_a_call_goes_on_behind_the_last_one(tmp_path, monkeypatch, capsys):
    def appended(name, code=0):
        text = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} '); raise SystemExit({code})"
        return python(text)

    given = [
        Stage("first", appended("first"), 0, 20),
        Stage("wrong", appended("wrong", 1), 0, 20),
        Stage("absent", appended("absent"), 0, 20, tool="no-such-program"),
        Stage("long", appended("long"), 1000, 2000),
    ]
    monkeypatch.setattr(half_hour, "stages", lambda folder, options: given)
    assert half_hour.half_hour(options_for(tmp_path)) == 1
    assert (tmp_path / "ran").read_text() == "first wrong "
    printed = capsys.readouterr().out
    assert "for the next call: long" in printed
    assert "FAILED wrong" in printed
    (report,) = tmp_path.glob("full-*/stages.json")
    states = {name: end["state"] for name, end in json.loads(report.read_text())["stages"].items()}
    assert states == {"first": "done", "wrong": "failed", "absent": "not here"}

    again = options_for(tmp_path, again=["wrong"], seconds=2000.0)
    assert half_hour.half_hour(again) == 1
    assert (tmp_path / "ran").read_text() == "first wrong wrong long "


def test_a_tool_that_takes_too_long_is_begun_twice(tmp_path, monkeypatch, capsys):
    given = [
        Stage("watched", python("import time; time.sleep(600)"), 0, 1, tool="sh"),
        Stage("next", python(""), 0, 20, after="watched"),
    ]
    monkeypatch.setattr(half_hour, "stages", lambda folder, options: given)
    for attempts, state in ((1, "stopped"), (2, "stopped too often"), (2, "stopped too often")):
        code = half_hour.half_hour(options_for(tmp_path))
        (report,) = tmp_path.glob("full-*/stages.json")
        stages = json.loads(report.read_text())["stages"]
        watched = stages["watched"]
        assert (watched["attempts"], watched["state"]) == (attempts, state)
        assert ("next" in stages) == (code == 1) == (attempts == 2)  # it does not wait for ever
        printed = capsys.readouterr().out
        assert ("FAILED watched" in printed) == (attempts == 2)
        assert ("for the next call" in printed) == (attempts == 1)


def test_ctrl_c_leaves_no_stage_behind(tmp_path):
    code = (
        "import time; open('begun', 'w').write('1'); time.sleep(30); open('late', 'w').write('1')"
    )
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
from pathlib import Path
from bench.gpu.half_hour import Stage, run_stage
run_stage(Stage("one", (sys.executable, "-c", {code!r}), 0, 0), Path({str(tmp_path)!r}), 60.0)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(half_hour.__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=60) != 0
    found = subprocess.run(["pgrep", "-f", "open('late'"], capture_output=True, text=True)
    assert str(tmp_path) not in found.stdout
    for pid in found.stdout.split():
        assert os.readlink(f"/proc/{pid}/cwd") != str(tmp_path)


def test_the_slowest_kernels(tmp_path):
    kernels = [{"kernel": "a", "ms": 1}, {"kernel": "b", "ms": 5}, {"kernel": "a", "ms": 4}]
    others = [{"kernel": "c", "ms": 3}, {"kernel": "d", "ms": 0.1}]
    shapes = {"cifar10-r32": {"kernels": kernels}, "dense": {"kernels": others}, "more": {}}
    (tmp_path / "gpu-x.json").write_text(json.dumps({"shapes": shapes}))
    assert slowest(tmp_path) == (["b", "a", "c"], "cifar10-r32")
    assert slowest(tmp_path / "nothing") == ([], "")


def test_changes_of_a_tile_are_bounded_and_always_the_same():
    found = list(changes(NVIDIA.logits))
    assert found == list(changes(NVIDIA.logits))
    assert NVIDIA.logits not in found
    assert len(set(found)) == len(found) > 24
    assert all(
        16 <= side <= 128 for tile in found for side in (tile.rows, tile.columns, tile.depth)
    )
    assert all(tile.depth == 0 for tile in changes(NVIDIA.softmax))


def test_the_record_that_is_printed_is_the_source():
    def tried(tile, ratio):
        return {"tile": vars(tile), "mean_ratio": ratio, "ratio": {}}

    better, other = Tile(64, 64, 16, warps=8, stages=3), Tile(16, 16, 16)
    found = {
        "logits": {"tried": [tried(other, 0.9), tried(better, 0.8), tried(Tile(32, 32, 32), None)]},
        "sign": {"tried": [tried(other, 0.99)]},
    }
    printed = record_of(found)
    assert "logits=Tile(64, 64, 16, warps=8, stages=3),  # 0.80 of the time" in printed
    assert "sign" not in printed
    changed = eval(
        printed, {"replace": __import__("dataclasses").replace, "NVIDIA": NVIDIA, "Tile": Tile}
    )
    assert changed.logits == better
    assert "no tile gains" in record_of({"sign": found["sign"]})


def assert_measured(found, printed):
    """What `bench.gpu` writes and prints, of all its parts."""
    assert {"iada", "torch", "triton", "python", "processor"} <= set(found["machine"])
    assert "triton = loss, gradients and update by the Triton kernels" in printed
    assert (found["left_out"], found["failures"], found["plans"]) == ([], {}, "replays")
    assert set(found["shapes"]) == {"tiny-full", "tiny-diag", "tiny-dense"}
    for name, shape in found["shapes"].items():
        for errors in shape["errors"].values():
            assert {"loss", "weight", "epsilon", "covariance", "count"} <= set(errors), name
        sides = set(shape["launched"]["ms"])
        assert {"triton", "torch", "triton_loss", "cross_entropy"} <= sides
        assert ("eager" in sides) == ("no_eager" not in shape) == (name != "tiny-dense")
        assert shape["with_torch_compiled"]["launched"]["by_triton"]["torch_compiled"] > 0
        assert shape["with_torch_compiled"]["graphs"] > 0
        assert len(shape["kernels"]) > 1 or name == "tiny-full"
        assert all(row["bytes"] > 0 and row["ms"] > 0 for row in shape["kernels"])
        assert f"| {name} |" in printed


def test_all_of_it_with_stubs(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        stub = programs / name
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "bench.gpu", "--full", "--dry-run", "--seconds", "1200"]
    command += ["--out", str(tmp_path), "--data", str(tmp_path)]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (report,) = tmp_path.glob("full-cpu/stages.json")
    stages = json.loads(report.read_text())["stages"]
    names = "errors memcheck racecheck initcheck times floor compiled tiles counters training"
    assert list(stages) == names.split()
    assert {end["state"] for end in stages.values()} == {"done"}
    assert "watched by compute-sanitizer" in stages["racecheck"]["output"]
    assert "watched by ncu" in stages["counters"]["output"]
    (counters,) = (line for line in done.stdout.splitlines() if line.startswith("counters: ncu"))
    assert "--kernel-name" in counters  # by what the stage times has found
    (path,) = report.parent.glob("gpu-cpu-torch*-triton*.json")
    found = json.loads(path.read_text())
    assert_measured(found, (report.parent / "compiled.log").read_text())
    for shape in found["shapes"].values():
        assert shape["parts"] == ["errors", "times", "floor", "torch-compiled", "eager-compiled"]
        assert {"triton", "cross_entropy"} <= set(shape["floor"]["launched"]["ms"])
        assert {"liger", "cut_cross_entropy"} & set(shape["floor"]["not_installed"])
    tiles = json.loads((report.parent / "tiles.json").read_text())
    assert tiles["complete"]
    assert "grad_features" in tiles["unswept"]
    assert all(len(entry["tried"]) == 1 for entry in tiles["tiles"].values())
