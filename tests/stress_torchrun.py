"""Short trainings under torchrun, one after the other; counts those that do not end well.

    python tests/stress_torchrun.py [--runs 200]

Not among the tests: it takes some seconds a run. `make stress` runs it.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent


def train() -> None:
    """What each of the two processes does: a few steps, then its end."""
    import torch

    from iada.utils.distributed import current_group, launched_group, size_of

    with launched_group():
        from tests.helpers.training import make_trainer

        assert size_of(current_group()) == 2
        trainer = make_trainer(method="isda", epochs=1, ce_epochs=0, warmup_epochs=0)
        trainer.fit()
        assert torch.isfinite(torch.tensor(trainer.history[-1]["loss"]))


def run_all(runs: int) -> int:
    """The number of runs that did not end well."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    bad = 0
    start = time.monotonic()
    for run in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as logs:
            # As `torchrun --standalone --nproc-per-node 2`, without starting it each time anew.
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=2,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                run_id=f"stress-{run}",
                max_restarts=0,
                monitor_interval=0.05,
                logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.ALL),
            )
            try:
                elastic_launch(config, sys.executable)(__file__, "--train")
            except ChildFailedError as error:
                bad += 1
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
                print(f"run {run}: exit codes by rank {codes}")
                for path in sorted(Path(logs).rglob("stderr.log")):
                    print(f"  {path.parent.name}: {path.read_text()[-300:]}")
        seconds = (time.monotonic() - start) / run
        print(f"{run} runs, {bad} ended badly, {seconds:.1f} s a run", flush=True)
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--train", action="store_true", help="what each process is started with")
    options = parser.parse_args()
    if options.train:
        train()
    else:
        paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        sys.exit(run_all(options.runs) > 0)
