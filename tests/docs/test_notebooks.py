"""The notebooks run as plain programs too, and reach what they say. `make docs` runs the cells."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
UNIX_HOME = re.compile(r"/(home|root|Users|tmp|var)/")


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_notebook(script, tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert not UNIX_HOME.search(ran.stdout + script.read_text())
    assert not [*tmp_path.iterdir()], "a notebook leaves no files"


def test_there_are_notebooks():
    assert {script.stem for script in NOTEBOOKS} >= {"swap_in", "noisy_labels", "long_tail"}
