"""log.csv and TensorBoard: what they hold is what the steps gave."""

import csv

import pytest
import torch

import iada
from iada.training.logs import COLUMNS, LISTS, CsvLog
from iada.training.measures import HISTOGRAM_BINS, PHASES, EpochMeasures
from tests.helpers.training import CLASSES, make_trainer


class Observer:
    """Everything the second phase's steps gave, by epoch."""

    def __init__(self):
        self.steps = {}

    def __call__(self, trainer, batch, result):
        self.steps.setdefault(trainer.epoch, []).append((batch[1], result))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(rows of log.csv, what was observed, the trainer) of one run."""
    folder = tmp_path_factory.mktemp("run")
    observer = Observer()
    trainer = make_trainer(folder, observe=observer)
    trainer.fit()
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file)), observer.steps, trainer


def numbers(cell):
    return [float(number) for number in cell.split()]


def test_one_row_an_epoch(run):
    rows, _, trainer = run
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    for row, record in zip(rows, trainer.history, strict=True):
        assert float(row["loss"]) == pytest.approx(record["loss"], rel=1e-8)
        assert float(row["accuracy"]) == pytest.approx(record["accuracy"], rel=1e-8)
    assert all(row["alpha"] == row["meta_loss"] == "" for row in rows[:2])
    assert all(float(row["alpha"]) == 0.5 for row in rows[2:])


def test_losses_and_strengths_are_those_of_the_steps(run):
    rows, steps, _ = run
    assert sorted(steps) == [2, 3, 4, 5]
    for epoch, seen in steps.items():
        row = rows[epoch]
        labels = torch.cat([labels for labels, _ in seen])
        epsilon = torch.cat([result.epsilon for _, result in seen])
        loss = torch.stack([result.loss for _, result in seen]).mean()
        meta_loss = torch.stack([result.meta_loss for _, result in seen]).mean()
        assert float(row["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert float(row["meta_loss"]) == pytest.approx(float(meta_loss), rel=1e-6)
        histogram = torch.histc(epsilon, HISTOGRAM_BINS, -1, 1)
        assert numbers(row["epsilon_histogram"]) == histogram.tolist()
        share = [float((epsilon[labels == c] > 0).double().mean()) for c in range(CLASSES)]
        assert numbers(row["adversarial_share"]) == pytest.approx(share, abs=1e-6)


def test_traces_and_times(run):
    rows, _, trainer = run
    sigma = trainer.method.covariance.covariance
    trace = sigma.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
    assert numbers(rows[-1]["covariance_trace"]) == pytest.approx(trace, rel=1e-6)
    for row in rows:
        assert all(float(row[f"seconds_{phase}"]) >= 0 for phase in PHASES)
        assert float(row["seconds_step"]) > 0
        assert float(row["seconds_validation"]) > 0
    assert float(rows[1]["seconds_checkpoint"]) > 0


def test_the_learning_rate_is_the_one_of_the_epoch(run):
    rows = run[0]
    rates = [float(row["lr"]) for row in rows]
    assert rates[0] == pytest.approx(0.05 * 0.01)  # warm-up
    assert rates[1] == pytest.approx(0.05)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_methods_without_strengths_leave_them_out(tmp_path):
    make_trainer(tmp_path, method="ce", epochs=2, ce_epochs=0).fit()
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(row[name] == "" for row in rows for name in (*LISTS, "meta_loss"))


def test_a_class_without_visits_has_no_share():
    measures = EpochMeasures(2, 3)
    step = iada.MetaStep(torch.tensor(1.0), torch.tensor(2.0), torch.tensor([0.5, -1.0, 1.0]))
    measures.record(0, step, torch.tensor([0, 0, 2]))
    summary = measures.summary(None)
    assert summary["adversarial_share"] == [0.5, None, 1.0]
    assert summary["loss"] == 1.0
    assert summary["epsilon_histogram"][0] == summary["epsilon_histogram"][-1] == 1


def test_csv_goes_on_without_doubles(tmp_path):
    log = CsvLog(tmp_path, 0)
    for epoch in range(4):
        log.write({"epoch": epoch, "loss": 0.5, "adversarial_share": [0.25, None]})
    with open(log.path, "a") as file:
        file.write("4,0.")  # cut short by a kill
    log = CsvLog(tmp_path, 2)
    log.write({"epoch": 2, "loss": 0.125})
    rows = log.path.read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["0", "0.5"], ["1", "0.5"], ["2", "0.125"]]
    assert rows[1].endswith(",0.25 nan,")


def test_a_foreign_csv_is_not_overwritten(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="log.csv: expected a log of this version, got other"):
        make_trainer(tmp_path, epochs=2).fit()
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,2\n"


def test_no_step_reads_the_device():
    """On the meta device nothing can be read: recording a step works there all the same."""
    measures = EpochMeasures(4, 3).to("meta")
    epsilon = torch.zeros(5, device="meta")
    loss = torch.zeros((), device="meta")
    labels = torch.zeros(5, dtype=torch.int64, device="meta")
    measures.record(0, iada.MetaStep(loss, loss, epsilon), labels)
    measures.record(1, loss, labels)
    with pytest.raises((RuntimeError, NotImplementedError)):
        measures.summary(None)


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path)
    trainer.tensorboard = True
    trainer.fit()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    found.Reload()
    losses = [event.value for event in found.Scalars("loss")]
    assert losses == pytest.approx([record["loss"] for record in trainer.history], rel=1e-6)
    assert {"meta_loss", "accuracy", "lr", "alpha", "seconds/step"} <= set(found.Tags()["scalars"])
    assert len(found.Scalars(f"covariance_trace/{CLASSES - 1}")) == 6
    strengths = found.Histograms("epsilon")
    assert [event.step for event in strengths] == [2, 3, 4, 5]
    assert all(event.histogram_value.num == 44 for event in strengths)


def test_tensorboard_is_asked_for_with_a_folder_and_the_package(tmp_path, monkeypatch):
    trainer = make_trainer()
    arguments = (trainer.backbone, trainer.head, trainer.train_set, trainer.meta_set)
    options = {"class_counts": torch.ones(CLASSES), "tensorboard": True}
    with pytest.raises(ValueError, match="folder: expected one for TensorBoard's files"):
        iada.Trainer(*arguments, trainer.config, **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tensorboard: expected the package tensorboard, got none"):
        iada.Trainer(*arguments, trainer.config, folder=tmp_path, **options).fit()
