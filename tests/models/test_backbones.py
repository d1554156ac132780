"""Backbones by name, and the split of a classifier into features and head."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import iada
from iada.models import BUILT_IN, build_backbone, cifar_resnet, split_classifier, wide_resnet

SMALL = ["resnet20", "resnet32", "wrn-16-4"]


@pytest.mark.parametrize("name", SMALL)
def test_built_in(name):
    backbone, head = build_backbone(name, 7)
    features = backbone.eval()(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, BUILT_IN[name][1])
    assert head(features).shape == (2, 7)


def test_parameters_are_those_of_the_papers():
    # He et al. 2016, table 6: 0.46 M with head; Zagoruyko and Komodakis 2016, table 4: 36.5 M.
    resnet = sum(p.numel() for p in cifar_resnet(32).parameters()) + 64 * 10 + 10
    assert round(resnet / 1e6, 2) == 0.46
    with torch.device("meta"):
        wide = sum(p.numel() for p in wide_resnet(28, 10).parameters()) + 640 * 10 + 10
    assert round(wide / 1e6, 1) == 36.5


@pytest.mark.parametrize(("build", "depth"), [(cifar_resnet, 33), (wide_resnet, 27)])
def test_depths_that_do_not_exist(build, depth):
    with pytest.raises(ValueError, match="depth: expected 6n"):
        build(depth)


class Classifier(nn.Module):
    """Two linear layers; `head` comes first in the order of registration."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, inputs):
        return self.head(self.body(inputs))


class Tokens(nn.Module):
    """Takes keyword arguments and answers with an object, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.inner = Classifier()

    def forward(self, input_ids, attention_mask):
        hidden = (self.embed(input_ids) * attention_mask[..., None]).sum(dim=1)
        return type("Output", (), {"logits": self.inner(hidden)})()


def test_the_split_gives_the_same_logits():
    model = Classifier().eval()
    inputs = torch.randn(6, 4)
    expected = model(inputs)
    backbone, head = split_classifier(model, inputs[:1])
    assert torch.equal(head(backbone(inputs)), expected)


def test_keyword_arguments_and_an_object_with_logits():
    model = Tokens().eval()
    tokens = {
        "input_ids": torch.randint(11, (2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.int64),
    }
    expected = model(**tokens).logits
    backbone, head = split_classifier(model, tokens)
    assert torch.equal(head(backbone(tokens)), expected)
    assert head.in_features == 5


def test_a_new_head_for_other_classes():
    backbone, head = split_classifier(Classifier(), torch.randn(1, 4), num_classes=9)
    assert head.out_features == 9
    assert backbone(torch.randn(2, 4)).shape == (2, 5)


def test_modes_and_buffers_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    model[2].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    backbone, _ = split_classifier(model, torch.randn(3, 4))
    assert backbone.model[1].training
    assert not backbone.model[2].training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


class OwnLinear(nn.Linear):
    """As timm's, whose forward is its own for TorchScript's sake."""

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_a_derived_class_comes_plain(bias):
    """With the same parameters, so that the losses, which never call it, are of what it does."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), OwnLinear(5, 3, bias)).eval()
    own, inputs = model[2], torch.randn(6, 4)
    own.weight.requires_grad_(False)
    expected = model(inputs)
    backbone, head = split_classifier(model, inputs[:1])
    assert type(head) is nn.Linear
    assert head.weight is own.weight
    assert head.bias is own.bias
    assert not head.training
    assert torch.equal(head(backbone(inputs)), expected)
    iada.Method(backbone, head, torch.optim.SGD(backbone.parameters(), lr=0.1))
    _, new = split_classifier(nn.Sequential(nn.Linear(4, 5), OwnLinear(5, 3)), inputs, 9)
    assert (type(new), new.out_features) == (nn.Linear, 9)


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Adapted(nn.Linear):
    """Adds a matrix that is 0 at first, as adapters of low rank do."""

    def __init__(self):
        super().__init__(4, 2)
        self.added = nn.Parameter(torch.zeros(2, 4))

    def forward(self, inputs):
        return super().forward(inputs) + nn.functional.linear(inputs, self.added)


class TwiceUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(self.layer(inputs))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, inputs):
        return self.head(self.embed(inputs).sum(dim=1))


REFUSED = {
    "an activation comes after it": (nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)), None),
    "no linear layer": (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten()), torch.zeros(1, 1, 4)),
    "logits of each token": (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3, 4)),
    "used twice": (TwiceUsed(), None),
    "shared weight": (Tied(), torch.zeros(1, 3, dtype=torch.int64)),
    "nothing before it": (nn.Linear(4, 2), None),
    "a head that does more": (nn.Sequential(nn.ReLU(), Scaled(4, 2)), None),
    "a head that will do more": (nn.Sequential(nn.ReLU(), Adapted()), None),
    "a parametrized head": (nn.Sequential(nn.ReLU(), weight_norm(nn.Linear(4, 2))), None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split(case):
    model, example = REFUSED[case]
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"model: expected .* write the two yourself"):
        split_classifier(model, torch.zeros(1, 4) if example is None else example)
    assert [name for name, _ in model.named_modules()] == names
    assert model.training


def test_a_head_that_does_more_is_named():
    message = "got Sequential, whose 1 is a Scaled that does more; write the two yourself"
    with pytest.raises(ValueError, match=message):
        split_classifier(nn.Sequential(nn.ReLU(), Scaled(4, 2)), torch.ones(1, 4))


@pytest.mark.parametrize("name", ["resnet", "torchvision/", "keras/resnet50", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="backbone: expected one of resnet8"):
        build_backbone(name, 2)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"backbone timm/resnet18: .* pip install timm"):
        build_backbone("timm/resnet18", 2)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_libraries(name):
    pytest.importorskip(name.split("/")[0], exc_type=ImportError)
    backbone, head = build_backbone(name, 4, image_size=64)
    assert head(backbone.eval()(torch.zeros(2, 3, 64, 64))).shape == (2, 4)
    with pytest.raises(ValueError, match="backbone: expected a model of"):
        build_backbone(name + "-none", 4)


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=8, n_heads=2, n_layers=1, hidden_dim=16
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    backbone, head = build_backbone(f"transformers/{tmp_path}", 2, pretrained=True)
    tokens = {"input_ids": torch.ones(3, 5, dtype=torch.int64)}
    assert head(backbone(tokens)).shape == (3, 2)
    with pytest.raises(ValueError, match=r"PATH with config\.json"):
        build_backbone(f"transformers/{tmp_path / 'none'}", 2)
