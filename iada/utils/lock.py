"""One run at a time in a folder: a lock that ends with the process that holds it."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from iada.utils.checks import argument_error

LOCK = ".lock"
# What file systems without locks answer.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_held: dict[tuple[int, Path], int] = {}  # how often a process has entered each folder


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Inside, no other process may enter the same folder; this one may, again.

    A POSIX record lock on the file `.lock`: the system lets go of it when the process ends, however
    that happens, and forked loader workers do not inherit it. So what a SIGKILL leaves behind locks
    nobody out.

    Raises:
        ValueError: another process is inside; nothing is changed.
        OSError: the folder cannot be written.
    """
    key = os.getpid(), folder.resolve()  # a forked child has not entered
    descriptor = None if key in _held else _acquire(folder)
    _held[key] = _held.get(key, 0) + 1
    try:
        yield
    finally:
        _held[key] -= 1
        if not _held[key]:
            del _held[key]
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # before letting go: it is still this process's
            os.close(descriptor)


def _acquire(folder: Path) -> int | None:
    """The descriptor that holds the lock; None, with a warning, where there are no locks."""
    try:
        import fcntl
    except ImportError:
        _warn(folder, "this system has no fcntl")
        return None
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            if error.errno in UNSUPPORTED:
                _warn(folder, str(error))
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            got = f"{folder}, in use by {holder or 'another process'}"
            remedy = "wait for that run or stop it, or choose another folder"
            expected = "one that no other process trains in"
            raise argument_error("folder", expected, got, remedy) from error
        if os.fstat(descriptor).st_nlink:
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder.encode(), 0)
            return descriptor
        os.close(descriptor)  # its former holder removed it in between: take the new one


def _warn(folder: Path, reason: str) -> None:
    remedy = "see to it that no other process trains in it"
    warnings.warn(f"folder: {folder} cannot be locked ({reason}); {remedy}", stacklevel=2)
