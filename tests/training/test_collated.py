"""`Collated`: batches of inputs that do not stack."""

import pytest
import torch
from torch.utils.data import Dataset, Subset

import iada
from iada.utils.loading import WholeBatches, batches, labels_of
from tests.helpers.training import differences, make_trainer


def pad(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def stack(rows):
    return torch.stack(rows)


class Texts(Dataset):
    """Lengths 1 to 4; the label is the first token."""

    labels = torch.arange(24) % 3

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.full((1 + index % 4,), 1 + int(self.labels[index])), self.labels[index]


class MeanOfWords(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(4, 8, padding_idx=0)

    def forward(self, tokens):
        return self.words(tokens).sum(dim=1) / (tokens > 0).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_stacks_trains_as_without_it(num_workers):
    states = []
    for wrap in (lambda data: data, lambda data: iada.Collated(data, stack)):
        trainer = make_trainer(num_workers=num_workers, epochs=3)
        trainer.train_set = wrap(trainer.train_set)
        trainer.meta_set = wrap(trainer.meta_set)
        trainer.fit()
        states.append(trainer.state_dict())
    assert differences(*states) == []


def test_inputs_of_several_lengths_train_and_are_evaluated(tmp_path):
    texts, held_out = Texts(), iada.Collated(Subset(Texts(), range(12)), pad)
    settings = {"epochs": 30, "ce_epochs": 2, "batch_size": 6, "lr": 0.5, "schedule": "constant"}
    config = iada.TrainerConfig.from_settings({"method": "logit-adjustment", **settings})
    torch.manual_seed(0)
    model = MeanOfWords(), torch.nn.Linear(8, 3)
    data = iada.Collated(texts, pad)
    trainer = iada.Trainer(*model, data, None, config, validation_set=held_out, folder=tmp_path)
    trainer.fit()
    assert trainer.history[-1]["accuracy"] == 1.0
    assert trainer.outputs(held_out).labels.tolist() == texts.labels[:12].tolist()


def test_a_batch():
    subset = Subset(Texts(), [3, 1, 0])
    data = iada.Collated(subset, pad)
    assert isinstance(data, WholeBatches)
    assert labels_of(data).tolist() == data.labels.tolist() == [0, 1, 0]
    assert data.groups is None
    (found,) = batches(data, [[2, 0]])
    assert found[0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert [part.tolist() for part in found[1:]] == [[0, 0], [2, 0]]
    inputs, label = data[1]
    assert inputs.tolist() == [2, 2]
    assert label == 1


def test_errors():
    with pytest.raises(ValueError, match=r"^collate: .* got a list; pass one$"):
        iada.Collated(Texts(), [])
    with pytest.raises(ValueError, match=r"^dataset: expected a map-style data set"):
        iada.Collated(iter([]), pad)
    with pytest.raises(ValueError, match=r"^dataset: expected items \(input, label\), got a dict"):
        iada.Collated([{"tokens": 1}], pad).whole_batch(0, 0, [0])
