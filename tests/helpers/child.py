"""Code in an interpreter of its own."""

import os
import subprocess
import sys


def python(code, folder=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
