"""Two runs never train into one folder, and nothing stale locks anybody out."""

import errno
import fcntl
import multiprocessing
import os

import pytest

from iada.utils.lock import LOCK, folder_lock
from tests.helpers.processes import held_by_another_process
from tests.helpers.training import make_trainer


def test_a_second_process_is_told(tmp_path):
    trainer = make_trainer(tmp_path)
    with held_by_another_process(tmp_path) as other:
        with pytest.raises(ValueError, match=f"in use by process {other} on .*; wait for that run"):
            trainer.fit()
        assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]
    assert (tmp_path / LOCK).exists()  # the other was killed
    trainer.fit()
    names = ["checkpoint.previous.pt", "checkpoint.pt", "log.csv"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names


def test_a_full_disk_leaves_the_lock_without_a_name(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK).read_bytes() == b""
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_held_while_training(tmp_path):
    def look(trainer, batch, result):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} ")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, observe=look).fit()
    assert not (tmp_path / LOCK).exists()


def enter(folder, answer):
    try:
        with folder_lock(folder):
            answer.put("inside")
    except ValueError:
        answer.put("locked out")


def from_a_fork(folder):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=enter, args=(folder, answer))
    process.start()
    found = answer.get(timeout=60)
    process.join(60)
    return found


def test_one_process_enters_again_and_leaves_at_the_last(tmp_path):
    with folder_lock(tmp_path):
        with folder_lock(tmp_path / "x" / ".."):
            assert from_a_fork(tmp_path) == "locked out"
        assert (tmp_path / LOCK).exists()
        assert from_a_fork(tmp_path) == "locked out"
    assert from_a_fork(tmp_path) == "inside"
    assert not (tmp_path / LOCK).exists()


def test_a_lock_that_was_removed_while_it_was_awaited_is_not_taken(tmp_path, monkeypatch):
    real, calls = fcntl.lockf, []

    def lockf(descriptor, kind):
        if not calls:
            (tmp_path / LOCK).unlink()  # as its former holder does on leaving
        calls.append(descriptor)
        return real(descriptor, kind)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with folder_lock(tmp_path):
        assert len(calls) == 2
        assert from_a_fork(tmp_path) == "locked out"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def lockf(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks"), folder_lock(tmp_path):
        pass
