"""Which build of the native library serves, and what is told where none does."""

import json
from pathlib import Path

import pytest
import torch

import iada
from iada_kernels import native, select_backend
from iada_kernels.native import library
from tests.helpers.child import python
from tests.helpers.forks import forked
from tests.kernels.test_native import needs_library


def test_native_says_why_it_cannot_serve():
    reasons = ("CPUs only", "turns it off", "not built", "hides the installed one")
    with pytest.raises(RuntimeError, match="|".join(f"native.*{reason}" for reason in reasons)):
        select_backend("native", torch.device("meta"))
    if native.is_available():
        with pytest.raises(RuntimeError, match="float8"):
            select_backend("native", torch.device("cpu"), torch.float8_e4m3fn)
        assert select_backend(None, torch.device("cpu")) is native


def test_without_the_library_torch_stands_in():
    code = """
import torch, iada, iada_kernels
from iada_kernels import native
assert not native.is_available()
h = torch.randn(4, 3, requires_grad=True)
iada.fused_loss(h, torch.eye(3), None, torch.arange(4) % 3, covariance=None).backward()
try:
    iada.fused_loss(h, torch.eye(3), None, torch.arange(4) % 3, covariance=None, backend="native")
except RuntimeError as error:
    print(error)
"""
    done = python(code, IADA_NATIVE_LIBRARY="none", IADA_REQUIRE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "turns it off" in done.stdout


def test_a_required_library_that_is_missing_is_an_error():
    done = python("import iada", IADA_NATIVE_LIBRARY="none", IADA_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "IADA_REQUIRE_NATIVE" in done.stderr


@needs_library
@pytest.mark.parametrize(
    ("num_classes", "width"),
    [(9, 33), (2, 40), (9, 200)],  # products; dots of few classes; columns in several panels
)
def test_every_instruction_set_agrees(num_classes, width):
    code = f"""
import json, torch, iada
from iada_kernels import native
torch.manual_seed(0)
h = torch.randn(50, {width}, dtype=torch.float64, requires_grad=True)
w = torch.randn({num_classes}, {width}, dtype=torch.float64)
state = iada.ClassCovariance({num_classes}, {width}).double()
y = torch.arange(50) % min(7, {num_classes})
state.update(h.detach(), y)
loss = iada.fused_loss(h, w, None, y, covariance=state, epsilon=torch.linspace(-.9, .9, 50))
loss.backward()
print(json.dumps([native.instruction_set(), loss.item(), h.grad.abs().sum().item()]))
"""
    sets = {}
    for name in ("portable", "avx2", "avx512"):
        done = forked("-c", code, IADA_INSTRUCTION_SET=name)
        assert done.returncode == 0, done.stderr
        served, *values = json.loads(done.stdout)
        sets[served] = values
    assert "portable" in sets
    for values in sets.values():
        assert values == pytest.approx(sets["portable"], rel=1e-12)


SERVED = "from iada_kernels import native; print(native.instruction_set())"


@needs_library
def test_an_instruction_set_that_there_is_not_is_an_error():
    """And none that is asked for is the best one."""
    best, empty, unknown = (
        python(SERVED, IADA_INSTRUCTION_SET=name)
        for name in ("avx512" if native.instruction_set() == "avx512" else "avx2", "", "AVX2")
    )
    if native.instruction_set() != "portable":
        assert empty.stdout == best.stdout, empty.stderr
    assert "IADA_INSTRUCTION_SET: expected one of 'portable', 'avx2', " in unknown.stderr
    assert "got 'AVX2'; set one, or unset it" in unknown.stderr


@needs_library
def test_a_library_may_be_named_by_a_relative_path():
    """Once and for all, whatever the folder is later. An empty name is no name."""
    code = f"import os, iada_kernels.native; os.chdir('/'); {SERVED}"
    path, home = Path(library.PATH), str(Path(iada.__file__).parents[1])
    done = python(code, path.parent, IADA_NATIVE_LIBRARY=path.name, PYTHONPATH=home)
    assert done.stdout.strip() == native.instruction_set(), done.stderr
    unnamed = "from iada_kernels.native import library; print(library.WHY_MISSING)"
    done = python(unnamed, IADA_NATIVE_LIBRARY="", IADA_REQUIRE_NATIVE="0")
    assert "does not load" not in done.stdout, done.stdout


@needs_library
def test_a_library_of_other_sources_is_told(monkeypatch):
    assert library._load() == (library.PATH, "", "")
    monkeypatch.setitem(library.ARGUMENTS, "loss_forward", 3)
    path, why, remedy = library._load()
    assert path is None
    assert why.endswith("is of another version: it has no loss_forward of 3 arguments")
    assert remedy == library.BUILD


@needs_library
def test_the_default_on_a_cpu_is_native():
    h = torch.randn(8, 4)
    y = torch.arange(8) % 3
    w = torch.randn(3, 4)
    default = iada.fused_loss(h, w, None, y, covariance=None)
    assert torch.equal(default, iada.fused_loss(h, w, None, y, covariance=None, backend="native"))
