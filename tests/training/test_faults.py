"""Faults that are injected into a training: nothing is lost, and there is one clear error.

SIGKILLs of the process itself: test_trainer_kill.py.
"""

import builtins
import errno
import itertools
import multiprocessing
import os
import random
import re
import signal

import pytest
import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader

from iada.training.checkpoint import CHECKPOINT, load_checkpoint, previous
from iada.utils.workers import loaders_ended, lost_workers_named
from tests.helpers.training import differences, make_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final state of a run that nothing stopped."""
    return final_state(make_trainer(tmp_path_factory.mktemp("whole"), epochs=3))


def final_state(trainer):
    trainer.resume()
    trainer.fit()
    return load_checkpoint(trainer.folder / CHECKPOINT)


# A full disk ---------------------------------------------------------------------------------


class FullDisk:
    """From the n-th use on, every call of one step of writing fails as on a full disk."""

    def __init__(self, patch, step, uses):
        self.left, self.used = uses, 0
        if step == "open":
            patch.setattr(builtins, "open", self.counting(builtins.open, of=writes))
        elif step == "write":
            patch.setattr(torch, "save", self.counting(torch.save))
        else:
            patch.setattr(os, step, self.counting(getattr(os, step)))

    def counting(self, function, of=lambda *arguments: True):
        def called(*arguments, **options):
            if of(*arguments):
                self.used += 1
                if self.used > self.left:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return called


def writes(path, mode="r", *rest):
    return str(mode)[:1] in "wa" and any(part in str(path) for part in ("checkpoint", "log.csv"))


def until_it_fails(folder):
    """The final state of a run in `folder`, and the error that it ended with."""
    try:
        return final_state(make_trainer(folder, epochs=3)), None
    except OSError as error:
        return None, str(error)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_disk_that_is_full_from_any_moment_on(tmp_path, whole, step):
    """Each use of `step` in turn is the first that fails, until the run ends before it."""
    failures = 0
    for uses in itertools.count():
        folder = tmp_path / str(uses)
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(patch, step, uses)
            state, error = until_it_fails(folder)
        if error is None:
            assert differences(state, whole) == []
            break
        assert "free some space" in error
        failures += 1
        assert not list(folder.glob(".*.part"))
        if uses:
            load_checkpoint(folder / CHECKPOINT)
        assert differences(final_state(make_trainer(folder, epochs=3)), whole) == []
    assert failures >= 4  # the first checkpoint and one an epoch


# A damaged checkpoint ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a finished run, and the bytes of its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, epochs=2).fit()
    return folder, (folder / CHECKPOINT).read_bytes()


def damaged(path):
    return (
        re.escape(f"checkpoint: expected one written by iada at {path}, got a file that cannot be")
        + r" read \(.*\); it is damaged or foreign, put checkpoint.previous.pt, the one before it"
    )


@pytest.mark.parametrize("length", [0, 1, 0.5, -500, -1])
def test_a_truncated_checkpoint_stops_a_resume(saved, length):
    folder, content = saved
    path = folder / CHECKPOINT
    path.write_bytes(content[: int(length * len(content)) if length == 0.5 else length])
    trainer = make_trainer(folder, epochs=2)
    before = [p.clone() for p in trainer.backbone.parameters()]
    with pytest.raises(ValueError, match=damaged(path)):
        trainer.resume()
    assert all(map(torch.equal, before, trainer.backbone.parameters()))


def test_a_changed_bit_is_found_or_changes_nothing(saved):
    """torch.load itself reads most of them without a word."""
    folder, content = saved
    path, draw, found = folder / CHECKPOINT, random.Random(0), 0
    path.write_bytes(content)
    expected = load_checkpoint(path)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            assert re.match(damaged(path), str(error)), error  # noqa: PT017
            found += 1
        else:  # in what fills the gaps between the tensors
            assert differences(state, expected) == []
    assert found > 50


def test_the_checkpoint_before_goes_on_to_the_same_end(tmp_path, whole):
    make_trainer(tmp_path, epochs=3).fit()
    path = tmp_path / CHECKPOINT
    former = previous(path)
    assert load_checkpoint(former)["epoch"] == 2
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="put checkpoint.previous.pt"):
        make_trainer(tmp_path, epochs=3).resume()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="got only checkpoint.previous.pt; rename that"):
        make_trainer(tmp_path, epochs=3).resume()
    with pytest.raises(ValueError, match="folder: expected no checkpoint of another run"):
        make_trainer(tmp_path, epochs=3).fit()
    former.rename(path)
    assert differences(final_state(make_trainer(tmp_path, epochs=3)), whole) == []


def test_a_file_system_without_hard_links(tmp_path, whole, monkeypatch):
    def refused(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    assert differences(final_state(make_trainer(tmp_path, epochs=3)), whole) == []
    assert not previous(tmp_path / CHECKPOINT).exists()


# A worker that is killed ---------------------------------------------------------------------


@pytest.mark.parametrize("worker", [0, -1])
def test_a_killed_worker_of_the_loader(tmp_path, whole, worker):
    """As the system kills one for want of memory; of the training loader, or of the last one.

    One a step of two epochs: torch's news of a worker may come where Python drops it, and nobody
    waits for a worker whose last batch is there already.
    """

    def kill(trainer, batch, result):
        children = multiprocessing.active_children()
        if trainer.epoch >= 1 and trainer.batch >= 1 and children:
            os.kill(children[worker].pid, signal.SIGKILL)

    trainer = make_trainer(tmp_path, epochs=3, num_workers=2, observe=kill)
    message = r"data: expected the loader's workers to live, got one that ended \(.*resume from"
    with pytest.raises(RuntimeError, match=message + f" {tmp_path}: the last checkpoint is intact"):
        trainer.fit()
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] in (1, 2)
    assert differences(final_state(make_trainer(tmp_path, epochs=3)), whole) == []


def test_one_error_however_many_workers_are_lost():
    """Torch tells of one worker of each loader that lives, the error's traceback keeping them."""

    def read():
        loaders = [iter(DataLoader(range(99), num_workers=1)) for _ in range(2)]
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        while True:
            for loader in loaders:
                next(loader)

    with (
        pytest.raises(RuntimeError, match="expected the loader's workers to live") as caught,
        lost_workers_named(),
        loaders_ended(),
    ):
        read()
    assert caught.value.__cause__ is not None
    _error_if_any_worker_fails()  # what torch's signal handler calls, whenever Python gets to it


def test_a_lost_worker_is_named_wherever_torch_notices():
    def notice():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    def save():
        try:
            notice()
        except RuntimeError as error:
            raise OSError("checkpoint: free some space") from error

    for place in (notice, save):
        with (
            pytest.raises(RuntimeError, match=r"got one that ended \(DataLoader worker \(pid 7\)"),
            lost_workers_named(),
        ):
            place()
    for other in (OSError("No space left on device"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(other), match=str(other)), lost_workers_named():
            raise other
