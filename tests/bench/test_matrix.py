"""Random combinations of what a loss can be asked, compiled for GPUs that are not here."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

from bench.offline.combinations import NEEDS, combinations, recorded_launches
from bench.offline.compiler import complaint
from tests.helpers.forks import forked
from tests.kernels.test_triton_compile import FITS, shipped_kernels

pytestmark = pytest.mark.slow


def test_combinations_are_those_of_their_seed():
    drawn = combinations(448)
    assert drawn == combinations(448)
    assert drawn[:5] == combinations(5)
    assert drawn != combinations(448, seed=1)


def test_combinations_cover_what_they_claim():
    drawn = combinations(448)
    assert {c.needs for c in drawn} == set(NEEDS)
    for name in ("structure", "reduction", "streams", "matmul", "other", "features", "weight"):
        assert len({getattr(c, name) for c in drawn}) >= 2, name
    for name in ("rows", "classes", "width"):
        sizes = {getattr(c, name) for c in drawn}
        assert 1 in sizes
        assert {size % 2 for size in sizes} == {0, 1}
    launched = set()
    for c in drawn:
        launched |= {launch.kernel.fn.__name__ for _, launch in recorded_launches(c, "sm_90")}
    assert launched == shipped_kernels()


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_a_sample_of_the_matrix_compiles_and_fits(architecture):
    done = forked(*("-m", "bench.resources", "--matrix", "--count", "2"), "--arch", architecture)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 complaints" in done.stdout


COVARIANCE_ALONE = """
import sys
from bench.offline.combinations import Combination, recorded_launches
from bench.offline.compiler import compiling_for
from bench.offline.compiler import complaint, figures_of
from iada_kernels.contract import LossNeeds
needs = LossNeeds(False, False, False, True, False, False)
for width, structure in ((16, "full"), (65, "full"), (65, "diag")):
    c = Combination(
        rows=33, classes=3, width=width, features="float32", weight="float32",
        covariance="float32", structure=structure, streams=False, terms=(), needs=needs,
        reduction="mean", matmul="highest", other="update", neighbours=0,
    )
    with compiling_for(sys.argv[1]):
        for part, launch in recorded_launches(c, sys.argv[1]):
            figures = figures_of(launch, sys.argv[1], {})
            print(launch.kernel.fn.__name__, complaint({**figures, "grid": launch.grid}) or "fits")
"""


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_the_gradient_by_the_covariance_alone(architecture):
    """On all three ways: the single launch, the general kernels, a diagonal Σ."""
    done = forked("-W", "ignore", "-c", COVARIANCE_ALONE, architecture)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert all(line.endswith("fits") for line in lines), done.stdout
    kernels = {line.split()[0] for line in lines}
    assert {"single_launch_kernel", "class_pass_kernel", "grad_variances_kernel"} <= kernels


def test_float64_may_keep_what_is_allowed():
    row = {**FITS, "stack": 1024, "spilled": 256}
    assert "in memory" in complaint(row)
    assert complaint(row, allowed_stack=1024) == ""
    assert "in memory" in complaint(row, allowed_stack=1023)


def test_interpreted_kernels_are_refused():
    command = [sys.executable, "-m", "bench.resources", "--matrix", "--count", "1"]
    done = subprocess.run(command, env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 2
