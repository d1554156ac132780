"""destroy_process_group() is the end of a group, whatever it was used for.

A group that lives on keeps gloo's threads, and they abort the process at its end now and then
(tests/stress_torchrun.py counts how often). Whether it lives on can be told without chance.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
]

# In a process of its own, as it depends on what is imported when.
PROGRAM = """
import weakref
import torch
import torch.distributed as dist
import iada
import iada.training.trainer
from tests.helpers.training import make_trainer

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
iada.training.trainer.current_group = lambda: dist.group.WORLD  # though it is of one process
trainers = [make_trainer(method=method, epochs=3) for method in ("meta-iada", "isda", "ce")]
for trainer in trainers:
    assert trainer.group is group()
    trainer.fit()
loss = iada.IADALoss(3, 4, process_group=dist.group.WORLD)
loss(torch.randn(2, 4), torch.randn(3, 4), None, torch.tensor([0, 1]))
dist.destroy_process_group()
assert group() is None, "the group lives on"
try:
    trainers[0].state_dict()
except RuntimeError as error:
    print(error)
"""


# An error that is caught, and in a cycle with itself, as plotting leaves some, keeps its frames.
CYCLE = """
import weakref
import torch.distributed as dist
from iada.utils.distributed import by_first, launched_group

def action():
    try:
        raise ValueError
    except ValueError as error:
        error.again = error

with launched_group():
    group = weakref.ref(dist.group.WORLD)
    by_first(action, dist.group.WORLD)
assert group() is None, "the group lives on"
"""


# An error on its way out has passed the last collection of garbage by when it is dropped. The
# second rank, which has the first one's error, is played by the same process.
ERROR = """
import gc
import weakref
import torch.distributed as dist
import iada.utils.distributed as distributed

def action():
    raise ValueError("of the first")

def exchange(value, group):
    return (None, OSError("told")) if other else (None, value[1])

gc.disable()
distributed.broadcast_object = exchange
for other in (False, True):
    distributed.rank_of = lambda group: int(other)
    try:
        with distributed.launched_group():
            group = weakref.ref(dist.group.WORLD)
            distributed.by_first(action, dist.group.WORLD)
    except (ValueError, OSError) as error:
        assert distributed.told_by_first(error) == other
        print(error)
    assert group() is None, "the group lives on"
"""


@pytest.mark.parametrize(
    ("program", "prints"), [(CYCLE, ""), (ERROR, "of the first\ntold\n")], ids=["caught", "raised"]
)
def test_no_cycle_keeps_a_launched_group_alive(program, prints):
    launched = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    paths = f"{Path(__file__).parents[2]}{os.pathsep}{os.pathsep.join(sys.path)}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **launched, **place, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == prints


def test_nothing_here_keeps_the_group_alive():
    paths = f"{Path(__file__).parents[2]}{os.pathsep}{os.pathsep.join(sys.path)}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "process_group: expected one that is alive, got one that was destroyed" in done.stdout
