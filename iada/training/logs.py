"""One row an epoch: log.csv, TensorBoard, and the progress bar."""

import contextlib
import csv
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np

from iada.training.measures import HISTOGRAM_BINS, PHASES
from iada.utils.checks import argument_error
from iada.utils.files import csv_text, fsync, remove_leftovers, write_text

Logger = Callable[[int, dict[str, float]], None]  # steps so far, and an epoch's numbers by name

CSV_FILE = "log.csv"
COLUMNS = (
    "epoch",
    "loss",
    "meta_loss",
    "accuracy",
    "lr",
    "alpha",
    *(f"seconds_{phase}" for phase in PHASES),
    "epsilon_histogram",
    "adversarial_share",
    "covariance_trace",
    "covariance_change",
)
OWN = frozenset(COLUMNS) - {"accuracy"}  # names that `measure` may not take
LISTS = ("adversarial_share", "covariance_trace")  # one number a class
MOST_CURVES = 100  # classes with a TensorBoard curve each; more of them share a histogram


class Logs:
    """The logs that are wanted of a run, from one of its epochs on.

    Args:
        epoch, epochs: the first one, and of the whole run.
        steps, done: of an epoch, and of the first one before.
        folder: for log.csv. tensorboard: write there for TensorBoard too.
        progress: whether to show it, or what to show it as.
        logger: called with the steps so far and the numbers of each epoch.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        steps: int = 1,
        done: int = 0,
        *,
        folder: Path | None = None,
        tensorboard: bool = False,
        progress: bool | str = False,
        logger: Logger | None = None,
    ) -> None:
        self.steps, self.logger = steps, logger
        self._opened = contextlib.ExitStack()
        self.logs: list[CsvLog | TensorBoardLog | ProgressBar | ProgressLines] = []
        self.bar: ProgressBar | None = None
        if folder is not None:
            self.logs.append(CsvLog(folder, epoch))
            if tensorboard:
                log = contextlib.closing(TensorBoardLog(folder, epoch))
                self.logs.append(self._opened.enter_context(log))
        title = progress if isinstance(progress, str) else ""
        if progress and importlib.util.find_spec("tqdm") is not None:
            self.bar = ProgressBar(epochs, steps, epoch * steps + done, title)
            self.logs.append(self._opened.enter_context(contextlib.closing(self.bar)))
        elif progress:
            self.logs.append(ProgressLines(epochs, epoch, title))

    def step(self) -> None:
        """One more step; nothing is read of it."""
        if self.bar is not None:
            self.bar.step()

    def write(self, row: dict[str, Any]) -> None:
        """One more epoch."""
        for log in self.logs:
            log.write(row)
        if self.logger is not None:
            numbers = {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, int | float) and name != "epoch"
            }
            self.logger((row["epoch"] + 1) * self.steps, {"epoch": row["epoch"], **numbers})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()


def measured(values: Any) -> dict[str, float | None]:
    """What a `measure` callback returned, as plain numbers: those alone can be logged and saved.

    Raises ValueError for anything else, and for a name that the log has itself.
    """
    if not isinstance(values, Mapping):
        got = f"a {type(values).__name__}"
        raise argument_error("measure", "a dict of numbers by name", got, "return {} for none")
    numbers: dict[str, float | None] = {}
    for name, value in values.items():
        if not isinstance(name, str) or name in OWN:
            raise argument_error("measure", "names that the log has not", repr(name), "rename it")
        try:
            plain = value is None or type(value) in (int, float)
            numbers[name] = value if plain else float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            got = f"a {type(value).__name__}"
            remedy = "reduce it to one"
            raise argument_error(f"measure {name!r}", "a number", got, remedy) from error
    return numbers


class CsvLog:
    """`log.csv`: COLUMNS and what is measured besides, one row an epoch; lists have spaces between.

    A column comes with the first row that has a value for it; rows before are empty there. The row
    of an epoch is on disk before its checkpoint is. Opened at the epoch that a run goes on from, it
    drops that epoch and later ones, and a row that a kill cut short: none comes twice.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self.path = folder / CSV_FILE
        remove_leftovers(self.path)
        self.columns, rows = self._read()
        with self._written("write the rows so far"):
            self._rewrite([row for row in rows if int(row[0]) < first_epoch])

    def write(self, row: dict[str, Any]) -> None:
        """Append one epoch. Raises OSError if it cannot be written."""
        new = [name for name in row if name not in self.columns]
        with self._written("append a row"):
            if new:
                _, rows = self._read()
                self.columns += new
                self._rewrite([[*cells, *[""] * len(new)] for cells in rows])
            with open(self.path, "ab") as file:
                file.write(csv_text([[_cell(row.get(name)) for name in self.columns]]).encode())
                fsync(file)

    @contextlib.contextmanager
    def _written(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path}: expected to {action}, got {error}; free some space "
                "(the last checkpoint is intact)"
            ) from error

    def _rewrite(self, rows: Iterable[list[str]]) -> None:
        write_text(self.path, csv_text([self.columns, *rows]))

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """The columns, and the whole rows, of a former run."""
        if not self.path.exists():
            return list(COLUMNS), []
        text = self.path.read_text(encoding="utf-8")
        header, *rows = list(csv.reader(text.splitlines())) or [list(COLUMNS)]
        if tuple(header[: len(COLUMNS)]) != COLUMNS:
            remedy = "move it elsewhere"
            raise argument_error(self.path, "a log of this version", "other columns", remedy)
        if not text.endswith("\n"):
            rows = rows[:-1]
        return header, [row for row in rows if len(row) == len(header) and row[0].isdigit()]


class TensorBoardLog:
    """The same in TensorBoard's format, in the folder `tensorboard`."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            remedy = "pip install tensorboard, or leave it False"
            raise argument_error("tensorboard", "the package tensorboard", "none installed", remedy)
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what an interrupted run wrote from the purge step on.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def write(self, row: dict[str, Any]) -> None:
        """One epoch: curves, and histograms of ε and, for many classes, over the classes."""
        writer, epoch = self.writer, row["epoch"]
        for name, value in row.items():
            if name == "epoch" or value is None:
                continue
            if name == "epsilon_histogram":
                self._strengths(value, epoch)
            elif name in LISTS:
                self._classes(name, value, epoch)
            else:
                writer.add_scalar(name.replace("seconds_", "seconds/"), value, epoch)
        writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()

    def _strengths(self, counts: Sequence[int], epoch: int) -> None:
        edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
        values = np.repeat((edges[1:] + edges[:-1]) / 2, counts)
        self.writer.add_histogram("epsilon", values, epoch, bins=edges)

    def _classes(self, name: str, values: Sequence[float | None], epoch: int) -> None:
        known = {c: value for c, value in enumerate(values) if value is not None}
        if len(values) > MOST_CURVES:
            self.writer.add_histogram(name, np.array(list(known.values())), epoch)
            return
        for c, value in known.items():
            self.writer.add_scalar(f"{name}/{c}", value, epoch)


class ProgressBar:
    """A tqdm bar over steps, with the time left and the numbers of the last epoch."""

    def __init__(self, epochs: int, steps: int, first_step: int, title: str = "") -> None:
        from tqdm.auto import tqdm

        self.epochs = epochs
        total = epochs * steps
        self.bar = tqdm(total=total, initial=first_step, unit="step", desc=title or None)
        self.shown: dict[str, str] = {}

    def step(self) -> None:
        """One more step."""
        self.bar.update()

    def write(self, row: dict[str, Any]) -> None:
        """One more epoch."""
        self.shown |= _shown(row)  # what not every epoch measures stays
        self.bar.set_postfix({"epoch": f"{row['epoch'] + 1}/{self.epochs}", **self.shown})

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


class ProgressLines:
    """Where there is no tqdm: a line an epoch, on stderr."""

    def __init__(self, epochs: int, first_epoch: int, title: str = "") -> None:
        self.epochs, self.first_epoch = epochs, first_epoch
        self.title = f"{title}: " if title else ""
        self.start = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """One more epoch, and how long the rest will take at this pace."""
        done = row["epoch"] + 1
        pace = (time.monotonic() - self.start) / (done - self.first_epoch)
        left = timedelta(seconds=round(pace * (self.epochs - done)))
        numbers = "".join(f", {name} {value}" for name, value in _shown(row).items())
        line = f"{self.title}epoch {done}/{self.epochs}{numbers}, {left} left"
        print(line, file=sys.stderr, flush=True)


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """What of a row is worth a look while it runs."""
    numbers = {name: row.get(name) for name in ("loss", "meta_loss", "accuracy")}
    return {name: f"{value:.4f}" for name, value in numbers.items() if value is not None}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(_cell(item) or "nan" for item in value)
    return repr(value) if isinstance(value, int) else f"{value:.9g}"
