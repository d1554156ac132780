"""Programs under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(*arguments, code=0, processes=2):
    """What `processes`, each on one thread, print: stdout, or stderr for another exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, "--nproc-per-node", str(processes), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done.stderr if code else done.stdout
