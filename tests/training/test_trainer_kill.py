"""A run that is killed with SIGKILL at any moment and resumed ends with the same bits."""

import csv
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from iada.training.checkpoint import load_checkpoint
from iada.utils.lock import LOCK
from tests.helpers.training import differences, make_trainer

pytestmark = pytest.mark.slow

# Children are forked from a server that has imported everything but computed nothing.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["iada", "torch._dynamo"])  # the optimizer imports the latter

CHECKPOINT, LOG = "checkpoint.pt", "log.csv"


def train(folder, ready, fault):
    """In a child: take up whatever is in `folder`, and train to the end or to `fault`."""
    if fault is not None:
        arm(fault)
    ready.set()
    trainer = make_trainer(folder)
    trainer.resume()
    trainer.fit()


def arm(fault):
    """From the third call of a step of writing on, the process kills itself within it."""
    calls = 0

    def deadly(function, spoil):
        def called(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls < 3:
                return function(*arguments, **options)
            spoil(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return called

    def half(state, file, *rest):
        file.write(b"half a checkpoint")
        file.flush()

    if fault == "in the middle of writing":
        torch.save = deadly(torch.save, half)
    elif fault == "before the disk has it":
        os.fsync = deadly(os.fsync, lambda *arguments: None)
    elif fault == "before renaming":
        os.replace = deadly(os.replace, lambda *arguments: None)
    elif fault == "after renaming":
        os.replace = deadly(os.replace, os.replace)
    elif fault == "in the middle of a row":
        import iada.training.logs

        def cut(log, row):
            with open(log.path, "a") as file:
                file.write(f"{row['epoch']},0.12")

        iada.training.logs.CsvLog.write = deadly(iada.training.logs.CsvLog.write, cut)
    else:
        raise ValueError(fault)


def start(folder, fault=None):
    """A child that trains in `folder`, once it is about to."""
    ready = context.Event()
    process = context.Process(target=train, args=(folder, ready, fault))
    process.start()
    assert ready.wait(60)
    return process


def finish(folder):
    """The final state and log of what `folder` holds."""
    process = start(folder)
    process.join(60)
    assert process.exitcode == 0
    return load_checkpoint(folder / CHECKPOINT), rows(folder)


def rows(folder):
    """log.csv without the times, which no two runs share."""
    with open(folder / LOG) as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in table]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    return finish(tmp_path_factory.mktemp("whole"))


def check(folder, whole):
    state, log = finish(folder)
    assert differences(state, whole[0]) == []
    assert log == whole[1]
    # A kill between the last checkpoint and the end leaves a lock that nobody holds.
    names = {entry.name for entry in folder.iterdir()} - {LOCK}
    assert names == {CHECKPOINT, "checkpoint.previous.pt", LOG}


def wait_for_epochs(process, folder, count):
    """Until the log has so many rows more, or the run has ended, however long that takes."""

    def lines():
        return (folder / LOG).read_text().count("\n") if (folder / LOG).exists() else 0

    wanted = lines() + count
    while process.is_alive() and lines() < wanted:
        time.sleep(0.002)


def test_twenty_kills_at_random_moments(tmp_path, whole):
    """Of one run, taken up after each; of another one where that has come to its end."""
    draw = random.Random(0)
    kills, epochs = 0, set()
    for run in range(20):
        folder = tmp_path / str(run)
        while kills < 20:
            process = start(folder)
            wait_for_epochs(process, folder, draw.choice((0, 1)))
            time.sleep(draw.uniform(0, 0.1))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            if (folder / CHECKPOINT).exists():
                epochs.add(load_checkpoint(folder / CHECKPOINT)["epoch"])
        check(folder, whole)
        if kills == 20:
            break
    assert kills == 20, "the runs end before they can be killed"
    assert len(epochs) > 2  # the moments were spread over the run


@pytest.mark.parametrize(
    "fault",
    [
        "in the middle of writing",
        "before the disk has it",
        "before renaming",
        "after renaming",
        "in the middle of a row",
    ],
)
def test_kills_while_writing(tmp_path, whole, fault):
    process = start(tmp_path, fault)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    load_checkpoint(tmp_path / CHECKPOINT)
    check(tmp_path, whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_draws_resumes_with_any_number_of_workers(tmp_path, whole, num_workers):
    def stop_in_the_second_epoch(trainer, batch, result):
        if trainer.epoch == 3 and trainer.batch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    part = make_trainer(tmp_path, num_workers=num_workers, observe=stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt, match="stopped at epoch 3; resume from"):
        part.fit()
    assert load_checkpoint(tmp_path / CHECKPOINT)["batch"] == 3
    check(tmp_path, whole)
