"""Programs beside the suite's own process, without the two seconds each takes to import torch.

One process imports it, and Triton without its interpreter, computes nothing, and forks for each
program. What a program says of importing, or of memory, is for a process of its own.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A line of its input holds a program's arguments, as `python` takes them, its environment and where
# output goes; a line of its output the exit status.
SERVER = """
import importlib.util, json, os, runpy, sys, traceback, warnings
import iada
if importlib.util.find_spec("triton"):
    import bench.offline.combinations, bench.offline.compiler, iada_kernels.triton

def run(arguments):
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])
        arguments = arguments[2:]
    kind, program, *rest = arguments
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})

for line in sys.stdin:
    arguments, environment, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY), number)
        os.environ.update(environment)
        status = 1
        try:
            run(arguments)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, text=True, bufsize=1, **pipes
    )
    atexit.register(server.stdin.close)
    return server


def forked(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """What `python ARGUMENTS` does in a fork: -c CODE or -m MODULE, with -W before at most."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        for file in (out, err):
            file.touch()
        server.stdin.write(json.dumps([arguments, environment, str(out), str(err)]) + "\n")
        status = server.stdout.readline()
        assert status, f"the server has ended with {server.wait()}"
        return subprocess.CompletedProcess(arguments, int(status), out.read_text(), err.read_text())
