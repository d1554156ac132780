"""What `iada.Trainer` can hand an epoch's numbers to: TensorBoard, Weights & Biases, MLflow.

Each is a few lines around the package, which is imported when it is asked for. A logger of your
own is any function of (step, {name: number}).
"""

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from iada.training.logs import Logger
from iada.utils.checks import check_choice

LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # and their packages


def logger_package(kind: str) -> Any:
    """The package of a kind of logger; ImportError where it is not installed."""
    check_choice("logger", kind, list(LOGGERS))
    try:
        return import_module(LOGGERS[kind])
    except ImportError as error:
        raise ImportError(f"{kind} is not installed; pip install {LOGGERS[kind]}") from error


@contextlib.contextmanager
def open_logger(
    kind: str,
    name: str = "iada",
    folder: str | Path = "runs",
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Logger]:
    """A logger of this kind, closed when the block ends.

        with iada.open_logger("wandb", "cats", settings=config.settings()) as logger:
            iada.Trainer(backbone, head, train_set, meta_set, config, logger=logger).fit()

    Args:
        kind: one of LOGGERS.
        name: what the run is called.
        folder: for TensorBoard's files, in `folder/tensorboard`, and W&B's; MLflow goes by its
            tracking URI (MLFLOW_TRACKING_URI), W&B by its own variables (WANDB_MODE=offline).
        settings: of the run, plain values, kept beside the curves.

    Raises:
        ImportError: the package is not installed.
        ValueError: another kind.
    """
    library = logger_package(kind)
    opened = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[kind]
    with opened(library, name, Path(folder), dict(settings or {})) as logger:
        yield logger


@contextlib.contextmanager
def _tensorboard(library: Any, name: str, folder: Path, settings: dict) -> Iterator[Logger]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("settings", "\n".join(f"    {k} = {v}" for k, v in settings.items()))

        def log(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key.replace("seconds_", "seconds/"), value, step)
            writer.flush()

        yield log


@contextlib.contextmanager
def _wandb(library: Any, name: str, folder: Path, settings: dict) -> Iterator[Logger]:
    folder.mkdir(parents=True, exist_ok=True)
    with library.init(project="iada", name=name, dir=str(folder), config=settings) as run:
        yield lambda step, numbers: run.log(numbers, step=step)


@contextlib.contextmanager
def _mlflow(library: Any, name: str, folder: Path, settings: dict) -> Iterator[Logger]:
    with library.start_run(run_name=name):
        library.log_params(settings)
        yield lambda step, numbers: library.log_metrics(numbers, step=step)
