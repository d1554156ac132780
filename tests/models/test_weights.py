"""Weights of files: first phases, checkpoints, other people's state dicts."""

import pytest
import torch
from torch import nn

from iada.models import build_backbone, load_weights, mlp, split_classifier


def parts(seed, classes=3):
    torch.manual_seed(seed)
    return mlp(6, (5, 4), classes)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict_best.feat_model.module."])
def test_the_names_may_have_a_prefix(tmp_path, prefix):
    (backbone, _), (other, other_head) = parts(0), parts(1)
    state = {prefix + name: value for name, value in backbone.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    assert not load_weights(other, other_head, tmp_path / "weights.pt")
    assert equal(backbone, other)
    assert equal(other_head, parts(1)[1])


def test_a_checkpoint_has_the_head_too(tmp_path):
    (backbone, head), (other, other_head) = parts(0), parts(1)
    moments = {"momentum_buffer": torch.ones(3, 4)}
    state = {"backbone": backbone.state_dict(), "head": head.state_dict(), "optimizer": moments}
    torch.save({"format": "x", "epoch": 3, **state}, tmp_path / "checkpoint.pt")
    assert load_weights(other, other_head, tmp_path / "checkpoint.pt")
    assert equal(backbone, other)
    assert equal(head, other_head)
    new = nn.Linear(4, 7)  # of another number of classes
    before = new.weight.clone()
    assert not load_weights(other, new, tmp_path / "checkpoint.pt")
    assert torch.equal(new.weight, before)


def test_an_inner_layer_of_the_heads_shape_is_not_the_head(tmp_path):
    def square(seed):
        torch.manual_seed(seed)
        return mlp(8, (16, 16), 16)

    (backbone, head), (other, other_head) = square(0), square(1)
    state = {"backbone": backbone.state_dict()}
    torch.save(state, tmp_path / "backbone.pt")
    assert not load_weights(other, other_head, tmp_path / "backbone.pt")
    assert equal(backbone, other)
    assert equal(other_head, square(1)[1])
    moving = {"average": {"3.weight": torch.zeros(16, 16)}}  # of the same shape, and no head
    torch.save({**state, "head": head.state_dict(), **moving}, tmp_path / "both.pt")
    assert load_weights(other, other_head, tmp_path / "both.pt")
    assert equal(head, other_head)
    state["model"] = {"fc.weight": head.weight, "classifier.1.weight": head.weight}
    torch.save(state, tmp_path / "two.pt")
    assert not load_weights(other, square(1)[1], tmp_path / "two.pt")


def test_a_model_that_was_split_takes_the_whole_models_file(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    whole, other = model(), model()
    state = whole.state_dict()
    del state["1.num_batches_tracked"]  # as in old files
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    backbone, head = split_classifier(other, torch.zeros(2, 6))
    assert load_weights(backbone, head, tmp_path / "weights.pt")
    assert torch.equal(backbone.model[0].weight, whole[0].weight)
    assert equal(head, whole[2])


def test_another_models_file_changes_nothing(tmp_path):
    backbone, head = parts(0)
    torch.save(mlp(6, (5, 3), 3)[0].state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: expected the weights of this backbone"):
        load_weights(backbone, head, tmp_path / "weights.pt")
    assert equal(backbone, parts(0)[0])
    (tmp_path / "weights.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"weights\.pt: expected a file of weights"):
        load_weights(backbone, head, tmp_path / "weights.pt")


def test_torchvisions_weights_by_name():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="weights: expected one of .*IMAGENET1K_V2, got 'V3'"):
        build_backbone("torchvision/resnet50", 10, pretrained=True, weights="V3")
