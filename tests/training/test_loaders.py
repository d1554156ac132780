"""What a loop of one's own is given, how labels are found, and the meta set's workers."""

import os
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
    random_split,
)

import iada
from iada.models import mlp
from iada.utils.loading import WithIndex, labels_of, to_device
from tests.helpers.training import differences, make_data, make_trainer

LABELS = [0, 2, 1, 1, 0]


class Pictures(Dataset):
    """As torchvision's data sets are."""

    def __init__(self, targets, target_transform=None):
        self.targets = targets
        self.target_transform = target_transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.full((2,), float(index)), int(self.targets[index])


# endless --------------------------------------------------------------------------------------


def test_endless_outlasts_the_loader():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=5, shuffle=True)
    read = [batch[0] for batch, _ in zip(iada.endless(loader), range(15), strict=False)]
    assert len(read) == 15
    passes = [torch.cat(read[i : i + 2]) for i in range(0, 14, 2)]
    assert all(sorted(rows.tolist()) == list(range(10)) for rows in passes)
    assert not all(torch.equal(rows, passes[0]) for rows in passes)  # shuffled each time


@pytest.mark.parametrize("whole_batches", [False, True])
def test_endless_gives_the_sampler_its_epoch(whole_batches):
    data = TensorDataset(torch.arange(8))

    def read(first_epoch):
        sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True)
        if whole_batches:
            batches = torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
            loader = DataLoader(data, batch_sampler=batches)
        else:
            loader = DataLoader(data, batch_size=4, sampler=sampler)
        stream = iada.endless(loader, first_epoch)
        return [next(stream)[0].tolist() for _ in range(3)]

    whole = read(0)
    assert whole[0] != whole[1]
    assert read(1)[:2] == whole[1:]


def test_endless_refuses_what_would_end_or_hang():
    empty = DataLoader(TensorDataset(torch.arange(3)), batch_size=5, drop_last=True)
    with pytest.raises(ValueError, match="^loader: expected at least one batch, got none; check"):
        next(iada.endless(empty))
    for wrong in (iter(empty), 3):
        with pytest.raises(ValueError, match="^loader: expected a DataLoader, got a .*; pass the"):
            iada.endless(wrong)  # at once, not at the first batch


# Indexed --------------------------------------------------------------------------------------


def test_indexed_batches_carry_the_place():
    data = iada.Indexed(Pictures(LABELS))
    inputs, labels, index = next(iter(DataLoader(data, batch_size=5, shuffle=True)))
    assert sorted(index.tolist()) == list(range(5))
    assert inputs[:, 0].tolist() == index.tolist()
    assert labels.tolist() == [LABELS[i] for i in index]
    assert data[-1][2] == 4
    with pytest.raises(IndexError):
        data[5]


def test_indexed_subsets_count_their_own_places():
    data = iada.Indexed(Subset(Pictures(LABELS), [4, 1]))
    assert [data[i][1:] for i in range(2)] == [(0, 0), (2, 1)]
    assert labels_of(data).tolist() == [0, 2]


class Items(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.item


@pytest.mark.parametrize(
    ("item", "got"),
    [
        ((1, 2, 3), "3 parts; reduce them to two"),
        ({"input_ids": 1, "labels": 2}, r"a dict; wrap it to give \(input, label\)"),
        (torch.zeros(3), "a Tensor; return the label"),
        ((1,), "a tuple; return the label"),
    ],
)
def test_items_that_are_no_pairs(item, got):
    with pytest.raises(ValueError, match=rf"^dataset: expected items \(input, label\), got {got}"):
        iada.Indexed(Items(item))[0]
    if not isinstance(item, tuple) or len(item) < 2:
        backbone, head = mlp(3, (4,), 3)
        config = iada.TrainerConfig(method="ce", epochs=1, ce_epochs=0)
        counts = torch.ones(3)
        trainer = iada.Trainer(backbone, head, Items(item), None, config, class_counts=counts)
        with pytest.raises(ValueError, match=f"got {got}"):
            trainer.fit()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("shape", [(3,), (), (2, 2)])
def test_tensor_data_in_a_loader_of_one_s_own(shape, num_workers):
    """A loader collates items; a batch that is one already would be stacked once more."""
    data = iada.TensorData(torch.randn(12, *shape), torch.arange(12) % 3)
    part, _ = random_split(data, [8, 4], torch.Generator().manual_seed(0))
    for dataset, count in ((data, 12), (part, 8), (Subset(data, [7, 2, 2, 11]), 4)):
        loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers)
        rows = []
        for inputs, labels, index in loader:
            assert torch.equal(inputs, data.inputs[index])
            assert torch.equal(labels, data.labels[index])
            rows += index.tolist()
        assert sorted(rows) == sorted(getattr(dataset, "indices", range(count)))


def test_tensor_data_needs_no_wrapper():
    with pytest.raises(ValueError, match="a data set that gives its index needs no wrapper"):
        iada.Indexed(iada.TensorData(torch.zeros(3, 2), torch.arange(3)))[0]


class Encoding(UserDict):
    """As Hugging Face's BatchEncoding is: a mapping, and no dict."""


Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    "kind", [dict, OrderedDict, Encoding, lambda values: defaultdict(list, values)]
)
def test_mappings_go_to_the_device(kind):
    batch = kind({"ids": torch.ones(2), "more": [torch.ones(3)], "name": "a"})
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is (dict if type(batch) is defaultdict else type(batch))
    assert moved["ids"].is_meta
    assert moved["more"][0].is_meta
    assert moved["name"] == "a"
    assert batch["ids"].device.type == "cpu"


def test_sequences_go_to_the_device():
    batch = ([torch.ones(2)], Pair(torch.ones(2), (torch.ones(3),)))
    (listed,), pair = to_device(batch, torch.device("meta"))
    assert listed.is_meta
    assert type(pair) is Pair
    assert pair.left.is_meta
    assert pair.right[0].is_meta


# Data sets that a Trainer takes ---------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (DataLoader(make_data()), "got a DataLoader; pass its data set, {name}.dataset"),
        (Stream(), "got a Stream; give it __getitem__ and __len__"),
        (Subset(make_data(), []), "expected at least one sample, got none"),
    ],
    ids=["loader", "stream", "empty"],
)
@pytest.mark.parametrize("name", ["train_set", "meta_set", "validation_set", "dataset"])
def test_what_is_no_data_set_is_refused_by_name(name, wrong, message):
    backbone, head = mlp(8, (4,), 3)
    parts = {"train_set": make_data(), "meta_set": make_data(), "validation_set": None}
    config = iada.TrainerConfig(epochs=1, ce_epochs=1)
    pattern = f"^{name}: .*" + message.format(name=name)
    if name == "dataset":
        trainer = iada.Trainer(backbone, head, config=config, **parts)
        for call in (trainer.class_accuracy, trainer.outputs):
            with pytest.raises(ValueError, match=pattern):
                call(wrong)
        return
    with pytest.raises(ValueError, match=pattern):
        iada.Trainer(backbone, head, config=config, **{**parts, name: wrong})


def test_labels_that_are_no_classes_are_not_rounded_to_some():
    backbone, head = mlp(8, (4,), 3)
    data, config = make_data(), iada.TrainerConfig(epochs=1, ce_epochs=1)
    trainer = iada.Trainer(backbone, head, data, data, config)
    shares = TensorDataset(data.inputs, data.labels + 0.5)
    for call in (trainer.class_accuracy, trainer.outputs):
        with pytest.raises(ValueError, match="^labels: expected integer .*, got dtype torch.float"):
            call(shares)


class Labelled(Pictures):
    def __init__(self, labels):
        super().__init__([0] * len(labels))
        self.labels = labels
        del self.targets

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize(
    "dataset",
    [
        Pictures(LABELS),
        Pictures(torch.tensor(LABELS)),
        Labelled(torch.tensor(LABELS, dtype=torch.uint8)),
        Labelled(np.array(LABELS)),
        TensorDataset(torch.zeros(5, 2), torch.tensor(LABELS)),
        Subset(Pictures([9, *LABELS]), range(1, 6)),
        Subset(Subset(Pictures([9, *LABELS]), [5, 4, 3, 2, 1]), torch.arange(4, -1, -1)),
        ConcatDataset([Pictures(LABELS[:2]), Labelled(torch.tensor(LABELS[2:]))]),
        iada.Indexed(Pictures(LABELS)),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_labels_at_hand(dataset):
    labels = labels_of(dataset)
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS
    backbone, head = mlp(2, (4,), 3)
    config = iada.TrainerConfig(method="ldam-drw", epochs=1, ce_epochs=0)
    margins = iada.Trainer(backbone, head, dataset, None, config).method.margins
    assert margins.argmax() == 2  # the rarest class of 2, 2 and 1


@pytest.mark.parametrize(
    "dataset",
    [
        Pictures(LABELS, target_transform=lambda label: 2 - label),  # serves other labels
        Subset(Pictures(LABELS, target_transform=lambda label: 2 - label), [0, 1]),
        Pictures([0.5, 1.0]),
        Pictures(["cat", "dog"]),
        Pictures(torch.zeros(5, 3, dtype=torch.int64)),
        Pictures([[1], [1, 2]]),
        TensorDataset(torch.zeros(5, 2)),
        ConcatDataset([Pictures(LABELS), Items((0, 1))]),
        Items((0, 1)),
    ],
)
def test_labels_that_must_be_told(dataset):
    assert labels_of(dataset) is None
    backbone, head = mlp(2, (4,), 3)
    config = iada.TrainerConfig(method="ce", epochs=1, ce_epochs=0)
    with pytest.raises(ValueError, match="^class_counts: .* no labels or targets, got None; pass"):
        iada.Trainer(backbone, head, dataset, None, config)


# A step's batches -----------------------------------------------------------------------------


def make_meta(parameters=None, **options):
    backbone, head = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)
    own = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(own if parameters is None else parameters(backbone), lr=0.1)
    return iada.MetaIADA(backbone, head, optimizer, torch.ones(3), **options)


def make_batch():
    return torch.randn(6, 4), torch.arange(6) % 3


def test_a_missing_meta_batch_is_told_where_to_come_from():
    meta = make_meta(interval=2)
    with pytest.raises(ValueError, match=r"^meta_batch: .* got None; pass one from iada\.endless"):
        meta.step(make_batch())
    meta.step(make_batch(), make_batch())
    assert not meta.needs_meta_batch
    meta.step(make_batch())


def test_a_dict_batch_is_told_how_to_part():
    texts = {"input_ids": torch.zeros(6, 4), "labels": torch.arange(6) % 3}
    with pytest.raises(ValueError, match=r"^batch: .* got a dict; take the labels out of it"):
        make_meta().step(texts, make_batch())


def test_an_optimizer_without_the_head_is_told_once(recwarn):
    meta = make_meta(lambda backbone: backbone.parameters())
    before = meta.head.weight.clone()
    with pytest.warns(UserWarning, match="^optimizer: expected the head's parameters"):
        meta.step(make_batch(), make_batch())
    assert torch.equal(meta.head.weight, before)
    recwarn.clear()
    meta.step(make_batch(), make_batch())
    frozen = make_meta(lambda backbone: backbone.parameters())
    frozen.head.requires_grad_(False)
    for quiet in (frozen, make_meta()):
        quiet.cross_entropy_step(make_batch())
        quiet.step(make_batch(), make_batch())
    assert not recwarn.list


# Workers --------------------------------------------------------------------------------------


class Worked(Dataset):
    """Notes which process read each sample of the meta set, in its input."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label, _ = self.data[index]
        who = get_worker_info()
        return torch.cat(
            [inputs, torch.tensor([os.getpid(), -1 if who is None else who.id])]
        ), label


def meta_batches(num_workers, interval, epochs=4):
    """(step, labels, index, processes) of each meta batch that a run read."""
    trainer = make_trainer(num_workers=num_workers, interval=interval, epochs=epochs)
    trainer.meta_set = Worked(make_data(9, 1))
    seen = []
    serve = trainer.meta_batch

    def meta_batch():
        batch = serve()
        if batch is None:
            return None
        seen.append((trainer._step, batch[1].tolist(), batch[2].tolist(), batch[0][:, 8:].tolist()))
        return batch[0][:, :8], *batch[1:]

    trainer.meta_batch = meta_batch
    trainer.fit()
    assert trainer._meta_stream is None  # its workers have ended
    return seen


@pytest.mark.parametrize("interval", [1, 4])
def test_the_meta_set_is_read_by_workers_in_the_same_order(interval):
    alone, shared = meta_batches(0, interval), meta_batches(2, interval)
    steps = list(range(12, 24, interval))
    assert [step for step, *_ in alone] == steps
    assert [entry[:3] for entry in alone] == [entry[:3] for entry in shared]
    assert {who[1] for *_, rows in alone for who in rows} == {-1}
    readers = {tuple(who) for *_, rows in shared for who in rows}
    assert len(readers) == 2  # two processes, the same ones from epoch to epoch
    assert {worker for _, worker in readers} == {0, 1}


@pytest.mark.parametrize("interval", [1, 3])
def test_workers_change_no_bit(interval):
    states = []
    for num_workers in (0, 2):
        trainer = make_trainer(num_workers=num_workers, interval=interval, epochs=4)
        trainer.fit()
        states.append(trainer.state_dict())
    assert differences(*states) == []


def test_a_meta_batch_is_the_step_s_wherever_it_is_asked():
    trainer = make_trainer()
    read = {}
    for step in (12, 13, 14, 13, 12):
        trainer.epoch, trainer.batch = divmod(step, 6)
        batch = trainer.meta_batch()
        assert differences(read.setdefault(step, batch), batch) == []


def test_draws_follow_from_the_step_and_the_sample():
    class Draws(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return float(torch.rand(())), 0

    def drawn(step, rows, seed=3):
        return [draw for draw, _, _ in WithIndex(Draws(), seed).__getitems__((step, rows))]

    first, second = drawn(4, [0, 1])
    assert first != second
    assert drawn(4, [1]) == [second]
    assert drawn(5, [0]) != [first]
    assert drawn(4, [0], seed=2) != [first]
