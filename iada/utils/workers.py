"""Loader workers that the system killed: one error that says so, wherever torch notices."""

import contextlib
import traceback
from collections.abc import Iterator

LOST = "DataLoader worker"  # how torch's messages about workers begin
BROKEN = (RuntimeError, OSError, EOFError)  # what is raised where one ended


class LostWorkers(RuntimeError):
    """A loader's worker ended; the message has the remedy."""


@contextlib.contextmanager
def lost_workers_named(where: object = None) -> Iterator[None]:
    """LostWorkers with the remedy if a loader's worker ends inside, of its own or by a signal.

    Torch raises from a signal handler, in the middle of anything, or where it waits for the worker;
    a broken connection is what remains of a worker whose end it has not noticed yet. `where`:
    the folder to resume from.
    """
    try:
        yield
    except BROKEN as error:
        reason = _lost_worker(error)
        if reason is None:
            raise
        _end_loaders(error)  # if news came on the way into `loaders_ended`
        rest = "" if where is None else f" and resume from {where}: the last checkpoint is intact"
        raise LostWorkers(
            f"data: expected the loader's workers to live, got one that ended ({reason}), as they "
            f"do for want of memory; use fewer num_workers or smaller samples{rest}"
        ) from error


@contextlib.contextmanager
def loaders_ended() -> Iterator[None]:
    """Loaders that are read inside end with an error about a worker.

    Else torch, which tells once of each loader, would tell of the others where the caller has the
    error already. To be entered within `lost_workers_named`: news may come on the way in here.
    """
    try:
        yield
    except BROKEN as error:
        if _lost_worker(error) is not None:
            _end_loaders(error)
        raise


def _end_loaders(error: BaseException | None) -> None:
    """Those that only the frames of a traceback keep: torch watches their workers until they go."""
    while error is not None:
        try:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        except RuntimeError:  # torch's news of one more worker
            continue


def _lost_worker(error: BaseException | None) -> str | None:
    """What torch, or the connection to the worker, says; None if no worker is the reason."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith(LOST):
            return str(error).strip().rstrip(".")
        if isinstance(error, EOFError | ConnectionError):
            return f"its connection broke: {type(error).__name__}"
        error = error.__cause__ or error.__context__
    return None
