"""Other processes beside the tests' own."""

import contextlib
import subprocess
import sys

HOLD = """
import sys
from pathlib import Path
from iada.utils.lock import folder_lock
Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
with folder_lock(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another_process(folder):
    """Inside, a process holds the folder's lock; gives its id. It is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"inside\n"
            yield process.pid
        finally:
            process.kill()
