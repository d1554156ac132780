"""What an installation lacks is said: once at the first call, and in every table and record."""

import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import torch

import bench.__main__
import bench.cpu
import bench.meta
import iada
from iada.__main__ import main
from iada_kernels import SlowBackendWarning, dispatch, native, select_backend, torch_ops
from iada_kernels import __main__ as which
from iada_kernels.environment import environment
from iada_kernels.native import library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CALLS = """
import torch, warnings, iada, iada_kernels
torch.set_num_threads(1)
h, w, y = torch.ones(4, 3, requires_grad=True), torch.eye(3), torch.arange(4) % 3
def call(loss=iada.fused_loss, **options):
    return loss(h, w, None, y, covariance=None, **options)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {calls}
for warning in caught:
    if issubclass(warning.category, iada_kernels.SlowBackendWarning):
        print(warning.filename, warning.message)
"""
DEFAULT_TWICE = (
    "call(); call(); iada.ClassCovariance(3, 3).update(torch.ones(2, 3), torch.tensor([0, 1]))"
)
COMPILED = "f = torch.compile(call, backend='eager', fullgraph=True); f(); f(); call()"


def warned(calls: str, library_path: str | None) -> list[str]:
    """The warnings of a fresh process that runs `calls`."""
    settings = {"IADA_REQUIRE_NATIVE": "0"}
    settings |= {} if library_path is None else {"IADA_NATIVE_LIBRARY": library_path}
    done = subprocess.run(
        [sys.executable, "-c", CALLS.format(calls=calls)],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("calls", [DEFAULT_TWICE, COMPILED], ids=["called", "compiled"])
def test_a_missing_library_is_said_once_with_reason_and_remedy(calls, tmp_path):
    absent = str(tmp_path / "absent.so")
    (line,) = warned(calls, absent)
    assert f"{absent} does not load" in line
    assert "pip install --no-build-isolation" in line


def test_it_names_the_caller(tmp_path):
    (line,) = warned("call()", str(tmp_path / "absent.so"))
    assert line.startswith("<string>")


def test_what_was_chosen_is_no_surprise(tmp_path):
    assert warned(DEFAULT_TWICE, "none") == []
    assert warned("call(backend='torch'); call(iada.eager_loss)", str(tmp_path / "absent.so")) == []


@pytest.mark.skipif(not native.is_available(), reason="no native library here")
def test_a_library_that_serves_is_no_reason_to_speak():
    assert warned(DEFAULT_TWICE, None) == []


def test_a_warning_made_an_error_is_one_at_each_call(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowBackendWarning)
        for _ in range(2):
            with pytest.raises(SlowBackendWarning):
                select_backend(None, torch.device("cuda"))


def test_gpus_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(SlowBackendWarning, match=r"pip install 'iada\[triton\]'"):
        assert select_backend(None, torch.device("cuda")) is torch_ops
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend(None, torch.device("cuda")) is torch_ops
        assert select_backend(None, torch.device("mps")) is torch_ops  # nothing to install there


@pytest.fixture
def gpu(monkeypatch):
    """What `dispatch` learns of the machine, to be changed."""
    pytest.importorskip("triton")
    found = {"capability": (9, 0), "gcc": "/usr/bin/gcc"}
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_launched", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found["capability"])
    monkeypatch.setattr(dispatch.shutil, "which", found.get)
    monkeypatch.delenv("CC", raising=False)
    return found


def test_gpus_that_triton_serves(gpu):
    assert select_backend(None, torch.device("cuda", 1)).__name__ == "iada_kernels.triton"
    gpu["capability"] = (7, 5)  # it is asked once for each GPU
    assert select_backend(None, torch.device("cuda", 1)).__name__ == "iada_kernels.triton"


def test_gpus_that_triton_does_not_support(gpu, capsys):
    gpu["capability"] = (7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to install
        assert select_backend(None, torch.device("cuda")) is torch_ops
    with pytest.raises(RuntimeError, match=r"'triton' .*capability 8.0 or more, this one has 7.5"):
        select_backend("triton", torch.device("cuda"))
    assert which.main() == 0
    assert "this one has 7.5; torch operators stand in" in capsys.readouterr().out


def test_gpus_without_a_compiler(gpu, monkeypatch):
    del gpu["gcc"]
    with pytest.warns(SlowBackendWarning, match="found none. Install gcc or clang"):
        assert select_backend(None, torch.device("cuda")) is torch_ops
    with pytest.raises(RuntimeError, match="C compiler, and found none"):
        select_backend("triton", torch.device("cuda"))
    dispatch._launched.clear()
    monkeypatch.setenv("CC", "cc")
    assert select_backend(None, torch.device("cuda")) is not torch_ops


def test_the_question_is_no_part_of_a_graph(monkeypatch):
    asked = []

    class Known(dict):
        def __contains__(self, index):
            asked.append(torch.compiler.is_compiling())
            return True

    monkeypatch.setattr(dispatch, "_launched", Known({0: "too old"}))

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + bool(dispatch._why_not_launched(0))

    assert chosen(torch.zeros(2)).tolist() == [1, 1]
    assert asked  # by Python itself, once, while it was traced


def test_sources_that_hide_an_installed_library(monkeypatch, tmp_path):
    path = tmp_path / "_native.so"
    path.touch()
    file = SimpleNamespace(name="_native.so", locate=lambda: PurePosixPath(path))
    installed = SimpleNamespace(files=[file], version=iada.__version__)
    monkeypatch.setattr(library.importlib.metadata, "distribution", lambda name: installed)
    why, remedy = library._why_not_here()
    assert str(ROOT) in why
    assert f"IADA_NATIVE_LIBRARY={path}" in remedy
    installed.version = "0.0.1"
    assert library._why_not_here()[1] == library.BUILD


def test_a_record_says_why_torch_operators_serve(monkeypatch):
    monkeypatch.setattr(dispatch.native, "is_available", lambda: False)
    monkeypatch.setattr(library, "WHY_MISSING", "no compiler")
    assert environment()["backend"] == "torch operators (native: no compiler)"
    assert dispatch.served_by("torch", CPU) == "torch operators"


MEMORY = {"shape": "x", "eager_bytes": 1.0, "fused_bytes": 1, "of_logits": 1.0}


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (bench.__main__, "--shapes civil-bert --rounds 1"),
        (bench.cpu, "--shapes civil-bert --rounds 1 --threads 1"),
        (bench.meta, "--cases resnet32_b64"),
    ],
    ids=["bench", "cpu", "meta"],
)
def test_tables_and_records_name_what_served(program, arguments, monkeypatch, tmp_path, capsys):
    if program is bench.cpu and not native.is_available():
        pytest.skip("measures the native library")
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["", *arguments.split(), "--json", str(path)])
    monkeypatch.setattr(program, "memory_row", lambda name: dict(MEMORY), raising=False)
    row = dict.fromkeys((*bench.meta.MODES, *bench.meta.MEMORY, "sgd_ms"), 1.0)
    monkeypatch.setattr(bench.meta, "_child", lambda *_: json.dumps(row))
    monkeypatch.setattr(bench.meta, "memory_row", lambda name: {})
    threads = torch.get_num_threads()
    try:
        assert program.main() == 0
    finally:
        torch.set_num_threads(threads)
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    for key in ("iada", "torch", "python", "processor", "backend"):
        assert written["machine"][key] == environment()[key]
    served = environment()["backend"]
    assert any(served in meaning for meaning in written["contestants"].values())
    assert served in printed
    assert f"iada {iada.__version__}" in printed


def test_the_table_of_resources_names_what_compiled(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    from bench import resources

    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["", "--json", str(path)])
    monkeypatch.setattr(resources, "INTERPRETED", False)
    monkeypatch.setattr(resources, "measured", lambda *_: [])
    assert resources.main() == 0
    machine = json.loads(path.read_text())["machine"]
    assert f"triton {machine['triton']}" in capsys.readouterr().out


def test_the_comparison_with_native_needs_native(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setattr(bench.cpu.native, "is_available", lambda: False)
    assert bench.cpu.main() == 2
    assert "expected the native library" in capsys.readouterr().err


def test_one_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"iada {iada.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    (version,) = project["tool"]["dynamic-metadata"]
    assert version["field"] == "version"
    source = version["input"]
    assert f'"{iada.__version__}"' in (ROOT / source).read_text()


def test_triton_is_not_for_everyone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("triton" in requirement for requirement in project["dependencies"])
    code = (
        "import sys; sys.modules['triton'] = None; from iada_kernels.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "not installed" in done.stdout
