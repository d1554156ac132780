"""One row an epoch: log.csv, TensorBoard, and the progress bar."""

import contextlib
import csv
import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iada.training.measures import HISTOGRAM_BINS, PHASES
from iada.utils.checks import complain
from iada.utils.files import remove_leftovers, to_disk, written_aside

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
)
LISTS = ("adversarial_share", "covariance_trace")  # one number a class
MOST_CURVES = 100  # classes with a TensorBoard curve each; more of them share a histogram


@contextlib.contextmanager
def open_logs(
    epoch: int,
    epochs: int,
    folder: Path | None = None,
    tensorboard: bool = False,
    progress: bool = False,
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one epoch's row to the logs that are wanted, from `epoch` on."""
    with contextlib.ExitStack() as stack:
        logs: list[CsvLog | TensorBoardLog | ProgressBar] = []
        if folder is not None:
            logs.append(CsvLog(folder, epoch))
            if tensorboard:
                logs.append(TensorBoardLog(folder, epoch))
        if progress:
            logs.append(ProgressBar(epochs, epoch))
        for log in logs:
            stack.callback(log.close)

        def write(row: dict[str, Any]) -> None:
            for log in logs:
                log.write(row)

        yield write


class CsvLog:
    """`log.csv`: COLUMNS, one row an epoch, lists as numbers with spaces between.

    The row of an epoch is on disk before its checkpoint is. Opened at the epoch that a run goes on
    from, it drops that epoch and later ones, and a row that a kill cut short: none comes twice.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self.path = folder / CSV_FILE
        remove_leftovers(self.path)
        rows = [row for row in self._read() if int(row[0]) < first_epoch]
        with written_aside(self.path) as file:
            file.write(_lines([COLUMNS, *rows]).encode())

    def write(self, row: dict[str, Any]) -> None:
        """Append one epoch. Raises OSError if it cannot be written."""
        try:
            with open(self.path, "ab") as file:
                file.write(_lines([[_cell(row.get(name)) for name in COLUMNS]]).encode())
                to_disk(file)
        except OSError as error:
            raise OSError(
                f"{self.path}: expected to append a row, got {error}; free some space "
                "(the last checkpoint is intact)"
            ) from error

    def close(self) -> None:
        """Nothing: the file is closed after each row."""

    def _read(self) -> list[list[str]]:
        """The whole rows of a former run."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        header, *rows = list(csv.reader(text.splitlines())) or [[]]
        if text and tuple(header) != COLUMNS:
            raise complain(
                str(self.path), "a log of this version", "other columns", "move it elsewhere"
            )
        if not text.endswith("\n"):
            rows = rows[:-1]
        return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit()]


class TensorBoardLog:
    """The same in TensorBoard's format, in the folder `tensorboard`."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            remedy = "pip install tensorboard, or leave it False"
            raise complain("tensorboard", "the package tensorboard", "none installed", remedy)
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what an interrupted run wrote from the purge step on.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def write(self, row: dict[str, Any]) -> None:
        """One epoch: curves, and histograms of ε and, for many classes, over the classes."""
        writer, epoch = self.writer, row["epoch"]
        for name in COLUMNS[1:]:
            value = row.get(name)
            if value is None:
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
        width = 2 / HISTOGRAM_BINS
        edges = [-1 + width * (place + 1) for place in range(HISTOGRAM_BINS)]
        middles = [edge - width / 2 for edge in edges]
        self.writer.add_histogram_raw(
            "epsilon",
            min=-1.0,
            max=1.0,
            num=sum(counts),
            sum=sum(n * m for n, m in zip(counts, middles, strict=True)),
            sum_squares=sum(n * m * m for n, m in zip(counts, middles, strict=True)),
            bucket_limits=edges,
            bucket_counts=list(counts),
            global_step=epoch,
        )

    def _classes(self, name: str, values: Sequence[float | None], epoch: int) -> None:
        known = {c: value for c, value in enumerate(values) if value is not None}
        if len(values) > MOST_CURVES:
            import numpy as np

            self.writer.add_histogram(name, np.array(list(known.values())), epoch)
            return
        for c, value in known.items():
            self.writer.add_scalar(f"{name}/{c}", value, epoch)


class ProgressBar:
    """A tqdm bar over epochs with the numbers of the last one, if tqdm is installed."""

    def __init__(self, epochs: int, first_epoch: int) -> None:
        self.bar = None
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=epochs, initial=first_epoch, unit="epoch")

    def write(self, row: dict[str, Any]) -> None:
        """One more epoch."""
        if self.bar is not None:
            shown = {name: row.get(name) for name in ("loss", "meta_loss", "accuracy")}
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items() if v is not None})
            self.bar.update()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(_cell(item) or "nan" for item in value)
    return repr(value) if isinstance(value, int) else f"{value:.9g}"


def _lines(rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
