"""Every Triton kernel compiles for every architecture and fits; nothing here needs a GPU.

The suite runs with interpreted kernels, which cannot be compiled: compiling has its own processes.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import iada_kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench.offline.compiler import SHARED_LIMIT, amd_usage, complaint, cuda_usage
from bench.resources import summary
from tests.helpers.forks import forked

pytestmark = pytest.mark.slow
ONE_OF_EACH_VENDOR = ("sm_90", "gfx942")
KERNELS = Path(iada_kernels.__file__).parent / "triton"

FITS = {
    "registers": 255,
    "stack": 0,
    "spilled": 0,
    "scalar_spills": 2,
    "shared": 227 * 1024,
    "tensor_memory": 512,
    "limit": 227 * 1024,
    "grid": [2**31 - 1, 65535, 65535],
}


def shipped_kernels() -> set[str]:
    """Names of the kernels that the package's sources define."""
    found = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert any("jit" in ast.unparse(d) for d in node.decorator_list), node.name
                found.add(node.name)
    return found


@pytest.mark.parametrize("architecture", ONE_OF_EACH_VENDOR)
def test_every_kernel_compiles_and_fits(architecture, tmp_path):
    """One launch of each. All launches for all GPUs take minutes: `make resources`, in CI."""
    path = tmp_path / "resources.json"
    command = ("-m", "bench.resources", "--sample", "--arch", architecture, "--json", str(path))
    done = forked(*command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(path.read_text())["rows"]
    assert sorted(row["kernel"] for row in rows) == sorted(shipped_kernels())
    assert len({row["shape"] for row in rows}) >= 3
    for row in rows:
        assert row["registers"] > 0, row
        assert row["stack"] == row["spilled"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[architecture], row


# The backward pass of one loss, which has a kernel for each set of gradients: every pair, and all.
GRADIENTS = """
import itertools, sys
from bench.offline.launches import inputs_of, meta, options_of
from bench.offline.compiler import compiling_for
from bench.offline.compiler import figures_of
from bench.measuring.shapes import SHAPES
from iada_kernels.contract import LossNeeds
from iada_kernels.dispatch import triton_backend
from iada_kernels.triton.launch import recording
architecture, shape = sys.argv[1], SHAPES[sys.argv[2]]
names = LossNeeds._fields
passes, inputs, options, known = triton_backend(), inputs_of(shape), options_of(shape), {}
with compiling_for(architecture):
    for wanted in [*itertools.combinations(names, 2), names]:
        needs = LossNeeds(**{name: name in wanted for name in names})
        with recording(execute=False, architecture=architecture):
            _, saved = passes.loss_forward(inputs, options, needs)
        with recording(execute=False, architecture=architecture) as launches:
            passes.loss_backward(inputs, options, saved, meta(), needs)
        assert launches
        for launch in launches:
            figures = figures_of(launch, architecture, known)
            print(" + ".join(wanted), launch.kernel.fn.__name__, figures.get("error", ""))
"""


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        *((architecture, "cifar10-r32") for architecture in ONE_OF_EACH_VENDOR),
        ("sm_90", "cifar10-wrn"),
        ("sm_90", "imagenet-diag"),
    ],
)
def test_any_two_gradients_compile_together(architecture, shape):
    done = forked("-c", GRADIENTS, architecture, shape)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "weight + covariance" in done.stdout
    small = shape == "cifar10-r32"  # otherwise the launches below would be of other kernels
    assert ("single_launch_backward_kernel" in done.stdout) == small
    assert "Error" not in done.stdout, done.stdout[-4000:]


def test_what_fits_passes():
    assert complaint(FITS) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, "8 bytes of each thread in memory"),
        ({"spilled": 1}, "in memory"),
        ({"shared": 227 * 1024 + 1}, "of shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"grid": [1, 65536]}, "grid"),
        ({"error": "CompilationError: at 1:1\nno such thing"}, "no such thing"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    row = {**FITS, **change, "architecture": "sm_90", "kernel": "k", "part": "step"}
    row["complaint"] = complaint(row)
    assert words in row["complaint"]
    assert summary([{**row, "shape": "a"}, {**row, "shape": "b"}]) == [
        f"sm_90 k (step) {row['complaint']}: a, b"
    ]


def test_reports_are_read():
    line = " Function k:\n  REG:255 STACK:72 SHARED:1040 LOCAL:8 CONSTANT[0]:672 TEXTURE:0"
    found = cuda_usage(line, dynamic=4096)
    assert (found.registers, found.stack, found.shared) == (255, 80, 4112)
    metadata = """
        scratch_store_dword off, v1, off offset:8
  - .agpr_count:     0
    .group_segment_fixed_size: 16
    .private_segment_fixed_size: 24
    .sgpr_count:     106
    .sgpr_spill_count: 1
    .vgpr_count:     93
    .vgpr_spill_count: 5
"""
    found = amd_usage(metadata, dynamic=4096)
    assert (found.registers, found.stack, found.spilled) == (93, 24, 5)
    assert (found.scalar_spills, found.shared) == (1, 4112)
    reserved = metadata.replace("scratch_store", "global_store")
    assert amd_usage(reserved, 0).stack == 0, "nothing is stored there"
    for read in (cuda_usage, amd_usage):
        with pytest.raises(ValueError, match="expected"):
            read("something else", 0)


# One launch of one kernel: tiles of 256 columns, several of them in flight.
ABSURD = """
import dataclasses, json, sys
from bench.offline.launches import recorded
from bench.offline.compiler import compiling_for
from bench.offline.compiler import complaint, figures_of
from bench.measuring.shapes import SHAPES
from iada_kernels.triton.config import Tile, configuration_for, use
architecture, *sizes = sys.argv[1:]
change = {"logits": Tile(*map(int, sizes))}
with compiling_for(architecture), use(
    dataclasses.replace(configuration_for(architecture), **change)
):
    _, launches = next(recorded(SHAPES["cifar100-wrn"], architecture))
    launch = next(x for x in launches if x.kernel.fn.__name__ == "rows_and_logits_kernel")
    print(complaint({**figures_of(launch, architecture, {}), "grid": launch.grid}))
"""


@pytest.mark.parametrize(
    ("architecture", "tile", "words"),
    [
        ("sm_90", (16, 16, 256, 4, 10), ["of each thread in memory", "of shared memory"]),
        ("gfx942", (16, 16, 256, 4, 4), ["of shared memory"]),
    ],
    ids=["sm_90", "gfx942"],
)
def test_an_absurd_configuration_fails(architecture, tile, words):
    done = forked("-c", ABSURD, architecture, *map(str, tile))
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(each in done.stdout for each in words), done.stdout


def test_interpreted_kernels_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "bench.resources"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unset it" in done.stderr
