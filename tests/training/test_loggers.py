"""What a trainer hands to loggers, and the adapters, with the packages stood in for."""

import sys
from types import ModuleType

import pytest
import torch

import iada


def trainer(logger, folder=None, **options):
    torch.manual_seed(0)
    data = iada.TensorData(torch.randn(24, 5), torch.arange(24) % 3)
    config = iada.TrainerConfig(method="ce", epochs=3, batch_size=8, lr=0.01)
    backbone = torch.nn.Linear(5, 4)
    head = torch.nn.Linear(4, 3)
    return iada.Trainer(backbone, head, data, None, config, folder=folder, logger=logger, **options)


def test_a_logger_has_the_numbers_of_each_epoch_at_its_step():
    calls = []
    run = trainer(
        lambda step, numbers: calls.append((step, numbers)), measure=lambda _: {"f1": 0.5}
    )
    run.fit()
    assert [step for step, _ in calls] == [3, 6, 9]
    assert [numbers["epoch"] for _, numbers in calls] == [0, 1, 2]
    assert calls[-1][1]["f1"] == 0.5
    assert calls[-1][1]["loss"] == run.history[-1]["loss"]
    assert all(isinstance(value, int | float) for _, numbers in calls for value in numbers.values())


class Recorder(ModuleType):
    """Stands for wandb and mlflow: what was called, in order."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.calls.append(("end",))

    def init(self, **options):
        self.calls.append(("init", options["name"], options["config"]))
        return self

    def log(self, numbers, step):
        self.calls.append(("log", step, numbers))

    def start_run(self, run_name):
        self.calls.append(("init", run_name))
        return self

    def log_params(self, settings):
        self.calls.append(("params", settings))

    def log_metrics(self, numbers, step):
        self.calls.append(("log", step, numbers))


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_adapters(kind, tmp_path, monkeypatch):
    library = Recorder(kind)
    monkeypatch.setitem(sys.modules, kind, library)
    with iada.open_logger(kind, "cats", tmp_path, {"lr": 0.1}) as logger:
        logger(3, {"loss": 1.0})
    first, *_ = library.calls
    assert first[:2] == ("init", "cats")
    assert {"lr": 0.1} in [part for call in library.calls[:2] for part in call]
    assert library.calls[-2:] == [("log", 3, {"loss": 1.0}), ("end",)]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with iada.open_logger("tensorboard", folder=tmp_path) as logger:
        trainer(logger).fit()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"loss" in content
    assert b"seconds/step" in content


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ImportError, match="wandb is not installed; pip install wandb"),
        iada.open_logger("wandb"),
    ):
        pass
    with pytest.raises(ValueError, match="logger: expected one of"), iada.open_logger("comet"):
        pass
