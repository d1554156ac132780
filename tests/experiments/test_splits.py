"""Splits: what they say of themselves, other uses of the meta set, tails of uneven data."""

import warnings
from dataclasses import replace

import pytest
import torch

from iada.experiments.datasets import Labelled
from iada.experiments.scenarios import (
    as_given,
    class_sizes,
    generalized_long_tail,
    long_tail,
    noisy_labels,
    subpopulation,
)
from iada.experiments.scenarios.split import outline


def numbered(labels):
    """Samples that can be told apart: each image holds its number, below 256."""
    labels = torch.as_tensor(labels)
    images = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1)
    return Labelled(images, labels, tuple("abcdef"[: int(labels.max()) + 1]))


def numbers(piece):
    return piece.inputs.flatten().long()


def test_meta_images_that_are_trained_on_have_right_labels():
    labels = torch.arange(60) % 3
    parts = {"train": numbered(labels), "test": numbered([0, 1, 2])}
    split = noisy_labels(parts, kind="flip", share=1.0, meta_size=6)
    joined = split.with_meta_in_train()
    assert joined.wrong.tolist() == [True] * 54 + [False] * 6
    assert torch.equal(joined.wrong, joined.train.labels != labels[numbers(joined.train)])
    assert torch.equal(joined.rows["train"], numbers(joined.train))
    assert sorted(joined.rows["train"].tolist()) == list(range(60))
    assert joined.record["class_counts"]["train"] == joined.train.class_counts().tolist()
    assert joined.record["class_counts"]["train"] != split.record["class_counts"]["train"]
    assert "meta" not in joined.record["class_counts"]


def test_groups_and_sets_of_samples_come_with_the_meta_images():
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    members = groups[:, None] == torch.tensor([0, 1, 1])
    kinds = {"group_names": ("g", "h"), "members": members, "member_names": ("k", "l", "m")}
    part = replace(numbered([0, 1, 0, 1, 0, 1]), groups=groups, **kinds)
    split = subpopulation({"train": part, "test": part}, meta_per_group=1, meta_from="train")
    assert split.train.group_counts().tolist() == [2, 2]
    joined = split.with_meta_in_train().train
    assert torch.equal(joined.groups, groups[numbers(joined)])
    assert torch.equal(joined.members, members[numbers(joined)])


def test_classes_and_groups_without_samples_are_counted():
    part = Labelled(torch.zeros(3, 1), torch.tensor([0, 1, 1]), tuple("abcd"))
    assert part.class_counts().tolist() == [1, 2, 0, 0]
    part = replace(part, groups=torch.tensor([1, 1, 0]), group_names=tuple("ghi"))
    assert part.group_counts().tolist() == [1, 2, 0]


def test_a_limit_of_the_meta_set_leaves_the_rest_unused():
    parts = {"train": numbered(torch.arange(60) % 3), "test": numbered([0, 1, 2])}
    split = long_tail(parts, ratio=2, meta_per_class=4)
    less = split.with_meta_limit(3)
    kept = [
        row.item()
        for c in range(3)
        for row in split.rows["meta"][split.meta.labels == c][:3]  # the first of each class
    ]
    assert less.rows["meta"].tolist() == sorted(kept)
    assert numbers(less.meta).tolist() == sorted(kept)
    assert less.record["class_counts"]["meta"] == less.meta.class_counts().tolist() == [3] * 3
    assert torch.equal(less.rows["train"], split.rows["train"])
    assert split.record["class_counts"]["meta"] == [4] * 3


def test_a_tail_of_uneven_classes_and_of_an_odd_number_of_them():
    uneven = {"train": numbered([0] * 8 + [1] * 4), "test": numbered([0, 1])}
    split = long_tail(uneven, ratio=2, meta_per_class=0)
    assert split.train.class_counts().tolist() == [6, 3]  # N/C is 6
    assert split.record["parameters"]["largest"] == 6
    assert class_sizes(8, 4, 5, "step") == [8, 8, 2, 2, 2]
    even = {"train": numbered(torch.arange(18) % 3), "test": numbered([0, 1, 2])}
    split = long_tail(even, ratio=2, convention="metasaug", meta_per_class=1)
    assert split.record["parameters"]["largest"] == 6
    assert split.train.class_counts().tolist() == [5, 3, 2]  # 5 · 2^(−i/2)
    for piece in ("train", "meta"):
        assert (split.rows[piece].diff() > 0).all()
    with pytest.raises(ValueError, match="class 'a': expected at least 7 images for this tail"):
        long_tail(even, ratio=2, convention="metasaug", meta_per_class=1, largest=7)


def test_what_a_class_gives_up_is_what_it_lacks():
    """Of 6 images 4 are kept; a meta set of 3 lacks one of these. The last class has some left."""
    parts = {"train": numbered(torch.arange(12) % 2), "test": numbered([0, 1])}
    split = long_tail(parts, ratio=4, largest=4, meta_per_class=3)
    assert split.record["meta_out_of_train"] == {"a": 1}
    assert split.train.class_counts().tolist() == [3, 1]
    assert split.meta.class_counts().tolist() == [3, 3]


def test_a_validation_set_that_is_all_meta_set_is_none():
    part = numbered([0, 1, 0, 1])
    split = as_given({"train": part, "validation": part, "test": part}, meta_per_class=2)
    assert split.validation is None
    assert split.meta.class_counts().tolist() == [2, 2]
    assert "validation" not in split.record["class_counts"]


def test_clusters_give_in_turns_where_one_image_has_to_stay():
    """Two of three images are taken, of clusters of two and of one: one of each."""
    clusters = torch.tensor([0, 0, 1] * 6)
    parts = {"train": numbered(torch.arange(6).repeat_interleave(3)), "test": numbered([0])}
    noise = 0.01 * torch.randn(18, 2, generator=torch.Generator().manual_seed(0))
    features = torch.eye(2)[clusters] + noise
    with pytest.warns(UserWarning, match="expected 4 images of each class, got 2"):
        split = generalized_long_tail(parts, features=features, clusters=2, meta_from="train")
    assert clusters[split.rows["meta"]].view(6, 2).sum(dim=1).tolist() == [1] * 6


def test_images_of_equal_features_are_one_cluster():
    parts = {"train": numbered([0] * 5 + [1] * 5), "test": numbered([0, 1])}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        split = generalized_long_tail(parts, features=torch.ones(10, 3), meta_from="train")
    assert [str(warning.message)[:9] for warning in told] == ["meta set:"]
    assert split.record["short"] == {"a": 2, "b": 2}


def test_an_outline_stays_as_it_is():
    """First phases that were made before are found by it."""
    many = Labelled(
        torch.arange(4000).remainder(251).to(torch.uint8).view(-1, 1, 1, 1),
        torch.arange(4000) % 3,
        ("a", "b", "c"),
    )
    assert outline(many) == {"count": 4000, "hash": "6dd262eb7cf2862ba4b536c246d4a897"}
