"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """While inside, a first Ctrl-C or SIGTERM is only noted; a second acts as it did before."""
    caught = False
    former: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        nonlocal caught
        caught = True
        restore()

    try:
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            for number in (signal.SIGINT, signal.SIGTERM):
                former[number] = signal.signal(number, note)
        yield lambda: caught
    finally:
        restore()
