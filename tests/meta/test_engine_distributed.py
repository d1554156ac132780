"""Two processes that share each batch equal one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import engine_process

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The ends of all runs, each by two processes under torchrun."""
    path = tmp_path_factory.mktemp("split") / "ends.pt"
    script = str(Path(engine_process.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path)


@pytest.mark.parametrize("mode", engine_process.MODES)
def test_two_processes_equal_one(split, mode):
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        # A difference of two forwards divides their rounding by its step.
        allowed = allowed * 100 if mode == "finite-difference" else allowed
        whole = engine_process.run(mode, dtype, None)
        torch.testing.assert_close(split[f"{mode} {dtype}"], whole, rtol=allowed, atol=allowed)


def test_processes_may_go_through_different_layers(split):
    """Stochastic depth, experts: each layer's gradient is its own, and none's is None."""
    whole = engine_process.run_experts(None)
    torch.testing.assert_close(split[engine_process.EXPERTS], whole, rtol=1e-12, atol=1e-12)
    untouched = engine_process.run_experts(None, steps=0)
    third = slice(2 * 48, 3 * 48)
    assert torch.equal(split[engine_process.EXPERTS][third], untouched[third])
