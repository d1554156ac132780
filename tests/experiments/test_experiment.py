"""What an experiment is made of: the samples that limits leave, and what is augmented, and when."""

from dataclasses import replace

import pytest
import torch

import iada
from iada.experiments import experiment
from iada.experiments.datasets import Labelled
from iada.experiments.experiment import Limits, make_view, make_views, read_parts
from iada.experiments.recipe import MethodEntry, ModelSettings, load
from iada.experiments.scenarios import as_given

CPU = torch.device("cpu")


def test_limits_are_of_each_class_and_keep_the_order(tmp_path, monkeypatch):
    labels = torch.arange(40) % 2
    inputs = torch.arange(40.0)[:, None]
    part = Labelled(inputs, labels, ("a", "b"))
    names = ("train", "validation", "test")
    monkeypatch.setitem(experiment.READERS, "fake", lambda path: dict.fromkeys(names, part))
    recipe = replace(load("table2/cifar10-100"), data={"reader": "fake"})
    parts = read_parts(recipe, tmp_path, Limits(train=7, test=3))
    counts = {name: found.class_counts().tolist() for name, found in parts.items()}
    assert counts == {"train": [7, 7], "validation": [3, 3], "test": [3, 3]}
    for found in parts.values():
        assert (found.inputs[:, 0].diff() > 0).all()


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_training_and_meta_images_alone_are_augmented(augment):
    labels = torch.arange(60) % 3
    part = Labelled(torch.zeros(60, 3, 8, 8, dtype=torch.uint8), labels, ("a", "b", "c"))
    split = as_given(dict.fromkeys(("train", "validation", "test"), part), meta_per_class=4)
    recipe = replace(load("table2/cifar10-100"), model=ModelSettings(augment=augment))
    entry = MethodEntry("ce", "CE", iada.TrainerConfig(method="ce", epochs=10), {})
    views = make_views(recipe, entry, split, CPU)
    found = {
        name: getattr(views, name).augments for name in ("train", "meta", "validation", "test")
    }
    wanted = augment != "none"
    assert found == {"train": wanted, "meta": wanted, "validation": False, "test": False}
    assert [len(view) for view in (views.train, views.meta)] == [60, 12]
    assert [len(view) for view in (views.validation, views.test)] == [48, 60]
    assert not make_view(recipe, part, CPU).augments
    assert views.train.plain_from is None
    staged = iada.TrainerConfig.from_settings(
        {"method": "afr", "epochs": 10, "batch_size": 16, "finetune_epochs": 3}
    )
    views = make_views(recipe, replace(entry, trainer=staged), split, CPU)
    assert views.train.plain_from == 4 * 7  # four steps in each of the seven epochs before
