"""What a classifier gives on a data set: by which precision, and by which random numbers."""

import os
import signal

import pytest
import torch
from torch import nn

import iada
from iada.utils.evaluate import by_batch
from iada.utils.loading import batches
from tests.helpers.training import Augmented, make_data, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_data_set_draws_follows_from_the_seed():
    data, order = Augmented(make_data(10)), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def features(**seed):
        given = by_batch(nn.Identity(), nn.Linear(8, 3), data, batch_size=4, **seed)
        return torch.cat([batch.features for batch in given])

    for seed in (0, 5):
        expected = torch.cat([inputs for inputs, *_ in batches(data, order, seed=seed)])
        assert torch.equal(features(seed=seed), expected)
    assert torch.equal(features(), features(seed=0))
    assert not torch.equal(features(), features(seed=5))


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_evaluation_runs_the_backbone_as_training_does(autocast):
    trainer, seen = make_trainer(autocast=autocast), []
    trainer.backbone.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    trainer.class_accuracy(make_data())
    trainer.outputs(make_data())
    assert seen == 2 * [torch.float32 if autocast == "none" else torch.bfloat16]


def test_an_observer_goes_on_with_what_it_had_seen(tmp_path):
    """As a log that was there all along: the last two of ten epochs count for ε."""
    settings = {"epochs": 10, "batch_size": 22}
    whole = make_trainer(observe=iada.SampleLog(44, 10), **settings)
    whole.fit()

    class Stopping(iada.SampleLog):
        def __call__(self, trainer, batch, result):
            super().__call__(trainer, batch, result)
            if (trainer.epoch, trainer.batch) == (9, 0):
                os.kill(os.getpid(), signal.SIGINT)

    part = make_trainer(tmp_path, observe=Stopping(44, 10), **settings)
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    rest = make_trainer(tmp_path, observe=iada.SampleLog(44, 10), **settings)
    assert rest.resume()
    rest.fit()
    assert set(whole.observe.seen.tolist()) == {2}
    for name, value in whole.observe.state_dict().items():
        assert torch.equal(rest.observe.state_dict()[name], value), name
