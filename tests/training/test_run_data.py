"""What a trainer is given: no data sets or settings, labels beyond the head, another's data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import iada
from iada.models import mlp
from iada.utils.loading import labels_of
from tests.helpers.training import differences, make_data


def trainer_on(method="meta-iada", **given):
    """Of a head with three classes."""
    torch.manual_seed(0)
    config = iada.TrainerConfig(method=method, epochs=2, ce_epochs=1, batch_size=20)
    given = {"train_set": make_data(), "meta_set": make_data(9, 1), **given}
    return iada.Trainer(*mlp(8, (4,), 3), config=config, **given)


def from_one(data):
    """The same with classes 1 to C."""
    return iada.TensorData(data.inputs, data.labels + 1)


@pytest.mark.parametrize("name", ["train_set", "meta_set", "validation_set"])
def test_labels_beyond_the_head_are_found_before_training(name):
    expected = rf"^{name}'s labels: expected class indices in \[0, 3\), got 3 at row 2; number"
    for data in (from_one(make_data(9, 1)), Subset(from_one(make_data()), range(9))):
        with pytest.raises(ValueError, match=expected):
            trainer_on(**{name: data})


def test_labels_that_a_data_set_serves_otherwise_are_left_to_it():
    class FromOne(Dataset):
        targets = (1, 2, 3)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.zeros(8), self.targets[index] - 1

    shown = FromOne()
    assert labels_of(shown).tolist() == [1, 2, 3]
    trainer_on(meta_set=shown, validation_set=shown).fit()


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda labels: labels.float(), r"got float32 of shape \(44,\); .* labels\.long\(\)"),
        (lambda labels: labels > 0, r"got bool of shape \(44,\); .* labels\.long\(\)"),
        (lambda labels: F.one_hot(labels, 3), r"got int64 of shape \(44, 3\); .*argmax\(1\)"),
        (lambda labels: labels[:, None], r"got int64 of shape \(44, 1\); .*squeeze\(1\)"),
    ],
    ids=["float", "bool", "one-hot", "column"],
)
@pytest.mark.parametrize("around", [None, lambda d: Subset(d, [0]), lambda d: ConcatDataset([d])])
def test_labels_of_another_kind_are_named(around, convert, message):
    data = TensorDataset(make_data().inputs, convert(make_data().labels))
    for name in ("train_set", "meta_set", "validation_set"):
        expected = rf"^{name}'s labels: expected integers, \(44,\), {message}"
        with pytest.raises(ValueError, match=expected):
            trainer_on(**{name: data if around is None else around(data)})


@pytest.mark.parametrize(
    ("arrays", "got"),
    [
        ((make_data().inputs, make_data().labels), "a tuple of arrays"),
        ([make_data().inputs.numpy(), make_data().labels.numpy()], "a list of arrays"),
        (make_data().inputs, "a Tensor"),
        (make_data().inputs.numpy(), "a ndarray"),
    ],
    ids=["tuple", "list", "tensor", "numpy"],
)
def test_arrays_are_no_data_set(arrays, got):
    for name in ("train_set", "meta_set", "validation_set"):
        pattern = rf"^{name}: expected .* got {got}; wrap it: torch\.utils\.data\.TensorDataset"
        with pytest.raises(ValueError, match=pattern):
            trainer_on(**{name: arrays})
    items = [(inputs, int(label)) for inputs, label, _ in make_data()]
    trainer_on("ce", validation_set=items).fit()  # a list of pairs is one


@pytest.mark.parametrize("kind", [lambda d: d, lambda d: TensorDataset(d.inputs, d.labels)])
def test_a_meta_set_that_is_the_training_set_is_told(kind, recwarn):
    data = make_data()
    twin = iada.TensorData(data.inputs, data.labels)
    message = "^meta_set: expected a small clean set of its own, got train_set"
    for sets in ((data, data), (kind(data), kind(twin))):
        with pytest.warns(UserWarning, match=message) as told:
            trainer_on(**dict(zip(("train_set", "meta_set"), sets, strict=True)))
        assert told[0].filename == __file__
    recwarn.clear()
    trainer_on("ce", train_set=data, meta_set=data)  # which does not look at it
    halves = [iada.TensorData(part, torch.arange(22) % 3) for part in data.inputs.chunk(2)]
    trainer_on(train_set=halves[0], meta_set=halves[1])
    assert not recwarn.list


def test_labels_of_a_step_of_ones_own_are_left_to_it():
    class SemiSupervised(iada.Method):
        def step(self, batch, meta_batch=None):
            assert int(batch[1].min()) == -1
            self.optimizer.step()
            return torch.zeros(())

    backbone, head = mlp(8, (4,), 3)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    config = iada.TrainerConfig(method=None, epochs=1, batch_size=44)
    data = iada.TensorData(make_data().inputs, make_data().labels - 1)
    options = {"method": SemiSupervised(backbone, head, optimizer), "class_counts": torch.ones(3)}
    iada.Trainer(backbone, head, data, None, config, **options).fit()


@pytest.mark.parametrize("config", [{"epochs": 2}, "run.toml", iada.TrainerConfig])
def test_what_is_no_config_is_named(config):
    kind = type(config).__name__
    with pytest.raises(ValueError, match=f"^config: expected an iada.TrainerConfig, got a {kind};"):
        iada.Trainer(*mlp(8, (16,), 3), make_data(), make_data(9, 1), config)


def reversed_rows(data):
    return iada.TensorData(data.inputs.flip(0), data.labels.flip(0))


@pytest.mark.parametrize("other", ["train_set", "meta_set"])
def test_the_same_samples_in_another_order_are_other_data(tmp_path, other):
    sets = {"train_set": make_data(), "meta_set": make_data(9, 1)}
    trainer_on(folder=tmp_path, **sets).save()
    trainer = trainer_on(folder=tmp_path, **{**sets, other: reversed_rows(sets[other])})
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match=f"^{other}: expected the labels that .* got others; put"):
        trainer.resume()
    assert differences(trainer.state_dict(), before) == []
    assert trainer_on(folder=tmp_path, **sets).resume()


def test_labels_that_are_not_known_are_not_compared(tmp_path):
    """Those of a data set that does not show them, and of a checkpoint from before they were."""
    sets = {"train_set": make_data(), "meta_set": make_data(9, 1)}
    trainer = trainer_on(folder=tmp_path, **sets)
    state = trainer.state_dict()
    hidden = [(inputs, int(label)) for inputs, label, _ in reversed_rows(sets["train_set"])]
    trainer_on(train_set=hidden, class_counts=torch.ones(3)).load_state_dict(state)
    del state["labels"]
    other = {name: reversed_rows(data) for name, data in sets.items()}
    trainer_on(**other).load_state_dict(state)
