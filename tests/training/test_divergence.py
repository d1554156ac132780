"""A run that diverges says so; a first use, with the defaults, does not."""

import dataclasses
import math
import os
import signal

import pytest
import torch
from torch import nn

import iada
from iada.methods.registry import METHODS
from iada.training.checkpoint import load_checkpoint
from iada.training.config import check_same_run
from iada.training.divergence import LossWatch
from tests.helpers.training import CLASSES, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_epochs_alone_make_a_run():
    for epochs in (1, 2, 3, 200):
        for method in METHODS:
            config = iada.TrainerConfig.from_settings(
                {"method": method, "epochs": epochs}, {"finetune_epochs": 1}
            )
            assert config.ce_epochs < epochs
            assert all(0 < mark < epochs for mark in config.milestones)
    config = iada.TrainerConfig()
    assert (config.ce_epochs, config.milestones) == (160, (160, 180))
    afr = iada.TrainerConfig(method="afr", epochs=250)
    assert (afr.ce_epochs, afr.milestones) == (0, (160, 180))


@pytest.mark.parametrize("method", METHODS)
def test_plain_epochs_follow_the_method(method):
    config = iada.TrainerConfig(method=method, epochs=100)
    staged = ("risda", "metasaug", "meta-iada")
    assert config.ce_epochs == (80 if method in staged else 0)
    assert iada.TrainerConfig(method=method, epochs=100, ce_epochs=7).ce_epochs == 7
    assert config.settings()["ce_epochs"] == config.ce_epochs


def test_defaults_with_which_a_first_run_trains():
    """Without them the README's configuration ends at chance in five seeds of eight."""
    config = iada.TrainerConfig()
    assert config.clip_norm == 1.0
    assert config.loss_limit > 0
    for method in ("meta-iada", "metasaug"):
        assert iada.TrainerConfig(method=method).method.keep_semidefinite


@pytest.mark.parametrize("milestones", [(160, 180), (100,), (5, 120)])
def test_milestones_that_never_come_are_refused(milestones):
    with pytest.raises(ValueError, match=r"milestones: expected epochs below epochs=100.*; lower"):
        iada.TrainerConfig(epochs=100, milestones=milestones)
    iada.TrainerConfig(epochs=100, milestones=milestones, schedule="cosine")  # not looked at


def test_a_run_goes_on_with_what_its_defaults_came_to():
    former = iada.TrainerConfig(epochs=10).settings()
    check_same_run(iada.TrainerConfig(epochs=10, ce_epochs=8, milestones=(8, 9)), former)
    with pytest.raises(ValueError, match="checkpoint's ce_epochs: expected 16"):
        check_same_run(iada.TrainerConfig(epochs=20), former)


def watch(losses, meta_losses=None, **options):
    """A LossWatch that has looked at these losses."""
    losses = torch.tensor(losses)
    if meta_losses is None:
        meta_losses, options = [torch.nan] * len(losses), {"meta_from": None, **options}
    found = LossWatch(losses, torch.tensor(meta_losses), epoch=3, first_step=30, **options)
    found.finish(len(losses))
    return found


def test_a_loss_that_explodes_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"loss: expected at most 2e\+03.* at step 32 "):
        watch([2.0, 1500.0, 2500.0], limit=1e3)
    with pytest.raises(FloatingPointError, match=r"meta loss: expected at most .* at step 31 "):
        watch([2.0, 1.0, 2e9], [torch.nan, 3000.0, 1.0], limit=1e3, meta_from=1)
    with pytest.raises(FloatingPointError, match="meta loss: .* got inf at step 30 "):
        watch([2.0], [torch.inf])
    assert watch([2.0, 1500.0, 1999.0], limit=1e3).start == 2.0
    watch([2.0, 1e9])  # no limit
    watch([80.0, 7e4, 3.0], limit=1e3)  # a start that was high already
    watch([1e-6, 900.0], limit=1e3)  # one that was too good
    with pytest.raises(FloatingPointError):
        watch([80.0, 7e4], limit=1e3, start=1.0)


def test_a_meta_loss_that_is_not_a_number_stops_the_run():
    message = r"^meta loss: expected a finite number, got nan at step 31 .*; try a smaller lr or"
    for meta_from in (0, 1):
        with pytest.raises(FloatingPointError, match=message):
            watch([1.0, 1.0], [1.0, torch.nan], meta_from=meta_from)
    for meta_from in (2, None):  # there was none
        watch([1.0, 1.0], [1.0, torch.nan], meta_from=meta_from)
    watched = watch([1.0, 1.0])
    watched.expect_meta_losses(2)
    watched.expect_meta_losses(4)
    assert watched.meta_from == 2


@pytest.mark.parametrize("interval", [1, 3])
def test_the_trainer_stops_at_a_meta_loss_that_is_not_a_number(tmp_path, interval):
    trainer = make_trainer(tmp_path, interval=interval)
    step = trainer.method.step

    def spoilt(*arguments):
        nan = torch.tensor(torch.nan)
        result = step(*arguments)
        return dataclasses.replace(result, meta_loss=nan) if trainer.epoch == 3 else result

    trainer.method.step = spoilt
    with pytest.raises(FloatingPointError, match=r"^meta loss: .* got nan at .*; try a smaller lr"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 3


def exploding(trainer, at):
    """The trainer, its loss multiplied from step `at` of the method on."""
    step, calls = trainer.method.step, []

    def exploded(*arguments):
        result = step(*arguments)
        calls.append(0)
        factor = 1e5 if len(calls) > at else 1.0
        return dataclasses.replace(result, loss=result.loss * factor)

    trainer.method.step = exploded
    return trainer


def test_the_trainer_stops_at_an_explosion(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^loss: .*loss_limit=1000 .*; try a smaller lr"):
        exploding(make_trainer(tmp_path), at=8).fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 3
    exploding(make_trainer(loss_limit=0.0), at=8).fit()


def test_a_run_that_starts_too_well_is_measured_by_chance():
    """The bound is loss_limit · log C, C = 3, where the first loss is below that of chance."""
    for share, sound in ((0.999, True), (1.001, False)):
        losses = iter([1e-6, share * 10 * math.log(CLASSES)])
        settings = {"epochs": 1, "ce_epochs": 0, "warmup_epochs": 0, "batch_size": 22}
        trainer = make_trainer(method="ce", loss_limit=10.0, **settings)
        step = trainer.method.step

        def told(*arguments, step=step, losses=losses):
            step(*arguments)
            return torch.tensor(next(losses))

        trainer.method.step = told
        if sound:
            trainer.fit()
            continue
        with pytest.raises(FloatingPointError, match=r"^loss: expected at most 11, loss_limit=10 "):
            trainer.fit()


def test_a_resumed_run_knows_its_start(tmp_path):
    def stop(trainer, batch, result):
        if trainer.epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    part = make_trainer(tmp_path, observe=stop)
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    rest = make_trainer(tmp_path)
    rest.resume()
    assert rest._first_loss == part._first_loss > 0
    with pytest.raises(FloatingPointError, match="loss_limit"):
        exploding(rest, at=0).fit()


def spoil(what):
    """An observer that leaves a Σ in the third epoch that no sound run has."""

    def observe(trainer, batch, result):
        if trainer.epoch == 2 and hasattr(trainer.method, "covariance"):
            sigma = trainer.method.covariance.covariance
            sigma[1] = what * torch.eye(sigma.shape[1])

    return observe


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (-3.0, r"training: expected covariances of positive trace, got -\d+ for class 1 at step"),
        (1e6, r"training: expected a quadratic term .* of the size of the logits, got .* at step"),
    ],
)
def test_a_covariance_gone_wrong_stops_the_run(tmp_path, what, message):
    trainer = make_trainer(tmp_path, observe=spoil(what), method="isda", ce_epochs=2, alpha=1e-9)
    step = trainer.method.step

    def step_of_small_loss(*arguments):  # so that the losses say nothing
        trainer.method.alpha = 1e-9
        result = step(*arguments)
        trainer.method.alpha = 0.5
        return result

    trainer.method.step = step_of_small_loss
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 2


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_check_for_loops_of_ones_own(structure):
    torch.manual_seed(0)
    head = nn.Linear(5, CLASSES)
    covariance = iada.ClassCovariance(CLASSES, 5, structure)
    iada.check_divergence(head, covariance, alpha=0.5)  # nothing seen yet
    covariance.update(torch.randn(60, 5), torch.arange(60) % CLASSES)
    iada.check_divergence(head, covariance, alpha=0.5)
    sound = covariance.covariance.clone()
    covariance.covariance[0] = -0.001 * sound[0]  # rounding, or one step from zero
    iada.check_divergence(head, covariance, alpha=0.5)
    for scale, message in (
        (-1.0, "positive trace, got -.* for class 0"),
        (1e5, "quadratic term .*logits differ by"),
        (float("nan"), "finite"),
    ):
        covariance.covariance.copy_(sound)
        covariance.covariance[0] *= scale
        with pytest.raises(FloatingPointError, match=rf"{message}.*; go back .*lower lr or alpha"):
            iada.check_divergence(head, covariance, alpha=0.5)
    meta = iada.MetaIADA(
        nn.Identity(),
        head,
        torch.optim.SGD(head.parameters(), lr=0.1),
        torch.ones(CLASSES),
        covariance=covariance,
    )
    with pytest.raises(FloatingPointError, match="finite head and covariance"):
        meta.check()
    covariance.covariance.copy_(sound)
    meta.check()
    meta.alpha = 1e5
    with pytest.raises(FloatingPointError, match="quadratic term"):
        meta.check()


def test_each_phase_has_its_own_start_and_each_epoch_its_end():
    trainer, losses = make_trainer(epochs=3, ce_epochs=2), []

    def note(own, batch, result):
        losses.append((own.epoch, float(getattr(result, "loss", result))))

    trainer.observe = note
    trainer.fit()
    assert trainer._first_loss == next(loss for epoch, loss in losses if epoch == 2)
    assert trainer.method.memory.epochs == 3


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("autocast", [False, True])
def test_where_a_divergence_begins(structure, autocast):
    """By hand: w₀ − w₁ = (1, 0), so that α R is ¼ of Σ's first entry; logits differ by 2 at μ₀."""
    head = nn.Linear(2, 2)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    head.bias.data = torch.tensor([0.0, 1.0])

    def diverges(first, second, count=(5, 5), shrinkage=0.0):
        state = iada.ClassCovariance(2, 2, structure, shrinkage=shrinkage)
        variances = torch.tensor([first, second])
        state.covariance.copy_(variances if structure == "diag" else torch.diag_embed(variances))
        state.mean[0, 0] = 3.0
        state.count.copy_(torch.tensor(count))
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                iada.check_divergence(head, state, alpha=0.5)
        except FloatingPointError:
            return True
        return False

    one = (1.0, 1.0)
    assert not diverges((1199.0, 0.0), one)  # 299.75 of 100 · (1 + 2)
    assert diverges((1203.0, 0.0), one)
    assert diverges((0.0, 1e5), (1203.0, 0.0))  # the class of the smaller trace
    assert not diverges((100.0, 0.0), (-0.98, 0.0))  # of −0.01 · 100
    assert diverges((100.0, 0.0), (-1.02, 0.0))
    assert diverges((1e5, 0.0), one)
    assert not diverges((1e5, 0.0), one, count=(0, 5), shrinkage=1.0)  # losses see the other's


def test_features_that_are_not_finite_name_the_remedy():
    loss = iada.IADALoss(CLASSES, 5)
    features = torch.full((4, 5), torch.nan)
    for call in (
        lambda: loss(features, torch.zeros(CLASSES, 5), None, torch.zeros(4, dtype=torch.long)),
        lambda: loss.covariance.update(features, torch.zeros(4, dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match="diverged: .*lower lr or alpha, clip the gradient"):
            call()
