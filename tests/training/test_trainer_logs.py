"""log.csv and TensorBoard: what they hold is what the steps gave."""

import csv
import importlib.util
import os
import re
import signal

import numpy as np
import pytest
import torch

import iada
from iada.meta.method import MetaStep
from iada.training.logs import COLUMNS, LISTS, CsvLog
from iada.training.measures import HISTOGRAM_BINS, PHASES, EpochMeasures
from tests.helpers.training import CLASSES, make_trainer


class Observer:
    """Everything the steps gave, by epoch."""

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
    for epoch in range(2, 6):
        row, seen = rows[epoch], steps[epoch]
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


def test_both_phases_are_observed(run):
    rows, steps, trainer = run
    assert sorted(steps) == list(range(6))
    assert all(len(seen) == 6 for seen in steps.values())
    for epoch in range(2):  # plain CE: the loss itself
        losses = torch.stack([result for _, result in steps[epoch]])
        assert not losses.requires_grad
        assert float(rows[epoch]["loss"]) == pytest.approx(float(losses.mean()), rel=1e-6)
    assert all(isinstance(result, iada.MetaStep) for _, result in steps[2])


def test_an_observer_can_tell_the_phases():
    seen = []
    note = lambda trainer, batch, result: seen.append((trainer.epoch, trainer.plain_phase))  # noqa: E731
    make_trainer(observe=note, epochs=4).fit()
    assert sorted(set(seen)) == [(0, True), (1, True), (2, False), (3, False)]


def test_traces_and_times(run):
    rows, _, trainer = run
    sigma = trainer.method.covariance.covariance
    trace = sigma.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
    assert numbers(rows[-1]["covariance_trace"]) == pytest.approx(trace, rel=1e-6)
    changes = [row["covariance_change"] for row in rows]
    assert changes[:2] == ["", ""]  # of plain CE
    assert all(0 < float(change) < 1e-2 for change in changes[2:])
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


def test_no_strength_is_neither_adversarial_nor_not_a_visit():
    measures, zero = EpochMeasures(1, 3), torch.zeros(())
    strengths = torch.tensor([0.0, 0.5, -0.5])
    measures.record(0, MetaStep(zero, zero, strengths), torch.arange(3))
    assert measures.adversarial.tolist() == [0, 1, 0]
    assert measures.visits.tolist() == [1, 1, 1]


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
    assert rows[1].endswith(",0.25 nan,,")


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


# What `measure` returns -----------------------------------------------------------------------


def measure_late(trainer):
    """From the third epoch on, and a second number from the fifth, of the types that occur."""
    assert not trainer.backbone.training
    if trainer.epoch < 2:
        return {}
    found = {"f1": np.float64(trainer.epoch) / 8, "none": None}
    return found if trainer.epoch < 4 else {**found, "recall": torch.tensor(0.5)}


def read(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def test_measured_numbers_are_logged_and_survive_a_resume(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    trainer = make_trainer(whole)
    trainer.measure = measure_late
    trainer.fit()
    rows = read(whole)
    assert tuple(rows[0]) == (*COLUMNS, "f1", "none", "recall")
    assert [row["f1"] for row in rows] == ["", "", "0.25", "0.375", "0.5", "0.625"]
    assert [row["recall"] for row in rows] == ["", "", "", "", "0.5", "0.5"]
    assert all(row["none"] == "" for row in rows)
    assert trainer.history[-1]["f1"] == 0.625
    assert trainer.history[2]["none"] is None
    assert all(row["accuracy"] for row in rows)  # the validation set's, beside them

    def stop(trainer, batch, result):
        if trainer.epoch == 4 and trainer.batch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = make_trainer(part, observe=stop)
    stopped.measure = measure_late
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    rest = make_trainer(part)
    rest.measure = measure_late
    assert rest.resume()  # the checkpoint holds plain numbers, which alone can be read again
    rest.fit()
    assert rest.history == trainer.history
    times = tuple(name for name in COLUMNS if name.startswith("seconds_"))
    for row, other in zip(rows, read(part), strict=True):
        assert tuple(row) == tuple(other)
        assert all(other[name] == row[name] for name in row if name not in times)


def test_a_kill_between_a_new_column_and_its_row(tmp_path):
    log = CsvLog(tmp_path, 0)
    log.write({"epoch": 0, "loss": 0.5})
    log.write({"epoch": 1, "loss": 0.5, "f1": 0.25})
    log = CsvLog(tmp_path, 1)  # that row is dropped, its column stays
    log.write({"epoch": 1, "loss": 0.125})
    assert [(row["epoch"], row["loss"], row["f1"]) for row in read(tmp_path)] == [
        ("0", "0.5", ""),
        ("1", "0.125", ""),
    ]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"loss": 1.0}, "measure: expected names that the log has not, got 'loss'; rename it"),
        ({3: 1.0}, "measure: expected names"),
        ({"f1": [1.0]}, "measure 'f1': expected a number, got a list; reduce it"),
        ({"f1": torch.zeros(2)}, "measure 'f1': expected a number, got a Tensor"),
        (None, "measure: expected a dict of numbers by name, got a NoneType"),
    ],
)
def test_what_cannot_be_logged_is_refused(found, message):
    trainer = make_trainer(epochs=2)
    trainer.measure = lambda trainer: found
    with pytest.raises(ValueError, match=message):
        trainer.fit()


def test_tensorboard_has_what_is_measured(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path, epochs=3)
    trainer.tensorboard, trainer.measure = True, measure_late
    trainer.fit()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("f1")] == [(2, 0.25)]


# Progress -------------------------------------------------------------------------------------


def test_the_bar_shows_accuracy(capsys):
    pytest.importorskip("tqdm")
    trainer = make_trainer(epochs=3)
    trainer.validation_set, trainer.progress = None, "ce, seed 4"
    trainer.measure = lambda own: {"accuracy": 0.625} if own.epoch == 0 else {}
    trainer.fit()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "ce, seed 4" in last
    assert "3/3" in last
    assert "accuracy=0.6250" in last  # of the epoch that measured it last


def test_without_tqdm_there_is_a_line_an_epoch(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tqdm" else find(name)
    )
    trainer = make_trainer(epochs=3)
    trainer.progress = "isda"
    trainer.fit()
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 3
    for epoch, (line, row) in enumerate(zip(lines, trainer.history, strict=True), 1):
        assert re.fullmatch(rf"isda: epoch {epoch}/3, loss .*, \d:\d\d:\d\d left", line)
        assert f"accuracy {row['accuracy']:.4f}" in line


def test_nothing_is_shown_unasked(capsys):
    make_trainer(epochs=2).fit()
    assert capsys.readouterr() == ("", "")
