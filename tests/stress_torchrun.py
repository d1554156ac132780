"""Short trainings under torchrun, one after the other; counts those that do not end well.

    python tests/stress_torchrun.py [--runs 200] [--busy 1]

Three kinds take turns: a script that trains, `python -m iada train`, and `python -m iada paper`.
Beside them `--busy` processes do nothing but compute, as the ends of processes that race are rarer
on a quiet machine. What a run that ended badly has written is kept, and named.

Not among the tests: it takes some seconds a run. `make stress` runs it.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = """
[data]
kind = "npz"
path = "data.npz"

[model]
hidden = [16]

[trainer]
method = "meta-iada"
epochs = 2
ce_epochs = 1
batch_size = 20
"""
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"


def train() -> None:
    """What each of the two processes of the script does: a few steps, then its end."""
    import torch

    from iada.utils.distributed import current_group, launched_group, size_of

    with launched_group():
        from tests.helpers.training import make_trainer

        assert size_of(current_group()) == 2
        trainer = make_trainer(method="isda", epochs=1, ce_epochs=0, warmup_epochs=0)
        trainer.fit()
        assert torch.isfinite(torch.tensor(trainer.history[-1]["loss"]))


def commands(folder: Path) -> dict[str, list[str]]:
    """Python's arguments for each kind; what it reads is in `folder`, and written to folder/out."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 100), ("meta", 10), ("test", 20)):
        arrays[f"{part}_inputs"] = rng.normal(size=(count, 8))
        arrays[f"{part}_labels"] = np.arange(count) % 5
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    config, out = folder / "run.toml", ["--out", str(folder / "out")]
    config.write_text(CONFIG, encoding="utf-8")
    row = ["--table", "digits", "--row", "long-tail", "--methods", "meta-iada"]
    smaller = ["--epochs", "2", "--evaluate-every", "2", "--device", "cpu"]
    return {
        "script": [__file__, "--train"],
        "iada train": ["-m", "iada", "train", "--config", str(config), *out],
        "iada paper": ["-m", "iada", "paper", *row, *smaller, *out],
    }


WRITTEN = {"script": 0, "iada train": 1, "iada paper": 1}  # results


def launch(arguments: Sequence[str], logs: Path) -> dict[int, int]:
    """Exit codes by rank of those of two processes that failed; their output goes to `logs`."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As `torchrun --standalone --nproc-per-node 2`, without starting it each time anew.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=logs.parent.name,
        max_restarts=0,
        monitor_interval=0.05,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


@contextlib.contextmanager
def load(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes compute inside; these."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run_all(runs: int) -> int:
    """Runs of every kind in turn; the number of those that did not end well."""
    done: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    start = time.monotonic()
    for run in range(runs):
        folder = Path(tempfile.mkdtemp(prefix=f"stress-{run + 1}-"))
        kinds = commands(folder)
        kind = list(kinds)[run % len(kinds)]
        codes = launch(kinds[kind], folder / "logs")
        results = [*folder.glob("out/result.json"), *folder.glob("out/**/record.json")]
        done[kind] += 1
        if not codes and len(results) == WRITTEN[kind]:
            shutil.rmtree(folder)
        else:
            bad[kind] += 1
            text = f"exit codes by rank {codes}" if codes else f"{len(results)} results"
            print(f"run {run + 1}, {kind}: {text}; its logs are kept in {folder}")
            for path in sorted((folder / "logs").rglob("stderr.log")):
                print(f"  {path.parent.name}: {path.read_text()[-300:]}")
        seconds = (time.monotonic() - start) / (run + 1)
        print(f"{run + 1} runs, {bad.total()} ended badly, {seconds:.1f} s a run", flush=True)
    for kind, count in done.items():
        print(f"{kind}: {count} runs, {bad[kind]} ended badly")
    return bad.total()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="of all kinds together (default 200)")
    parser.add_argument("--busy", type=int, default=1, help="processes beside them (default 1)")
    parser.add_argument("--train", action="store_true", help="what each process is started with")
    options = parser.parse_args(arguments)
    if options.train:
        train()
        return 0
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with load(options.busy):
        return int(run_all(options.runs) > 0)


if __name__ == "__main__":
    sys.exit(main())
