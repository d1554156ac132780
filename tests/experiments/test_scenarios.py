"""Scenarios: published sizes, true rates of noise, meta sets apart, all following the seed."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iada.experiments.datasets import Labelled
from iada.experiments.scenarios import (
    CONVENTIONS,
    SCENARIOS,
    Split,
    as_given,
    class_sizes,
    colored_mnist,
    generalized_long_tail,
    hold_out,
    long_tail,
    noisy_labels,
    subpopulation,
)


def part(labels, groups=None, seed=0, kinds=4):
    """Samples that can be told apart: each image holds its number."""
    labels = torch.as_tensor(labels)
    number = torch.arange(len(labels)) + 100_000 * seed
    images = (number[:, None] >> torch.tensor([0, 8, 16]) & 255).to(torch.uint8)
    names = tuple(f"class{c}" for c in range(int(labels.max()) + 1))
    kinds = tuple(f"group{g}" for g in range(kinds))
    return Labelled(
        images.view(-1, 3, 1, 1), labels, names, groups, kinds if groups is not None else ()
    )


def balanced(classes, each, seed=0):
    return part(torch.arange(classes * each) % classes, seed=seed)


def cifar(classes=10, each=50):
    return {"train": balanced(classes, each), "test": balanced(classes, 10, 1)}


def grouped():
    """Groups of very different sizes, as Waterbirds has them."""
    made = {}
    for seed, (name, sizes) in enumerate(
        {"train": [40, 3, 6, 20], "validation": [12, 12, 4, 4], "test": [20] * 4}.items()
    ):
        groups = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
        made[name] = part(groups // 2, groups, seed)
    return made


def numbers(piece):
    """The numbers that the images of a piece hold."""
    return (piece.inputs.view(-1, 3).long() << torch.tensor([0, 8, 16])).sum(dim=1).tolist()


def assert_apart(split):
    """No sample is in two of the four, nor twice in one."""
    pieces = [p for p in (split.train, split.meta, split.validation, split.test) if p is not None]
    every = [number for piece in pieces for number in numbers(piece)]
    assert len(every) == len(set(every))


def same(a, b):
    for name in ("train", "meta", "validation", "test"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.labels, other.labels)
    assert (a.wrong is None) == (b.wrong is None)
    return a.wrong is None or torch.equal(a.wrong, b.wrong)


@pytest.mark.parametrize(
    ("classes", "each", "convention", "total"),
    [
        (10, 5000, "ldam", 12_406),
        (100, 500, "ldam", 10_847),
        (10, 5000, "metasaug", 12_380),
        (100, 500, "metasaug", 10_626),
        (10, 5000, "step", 25_250),
        (100, 500, "step", 25_250),
    ],
)
def test_totals_of_the_published_tails(classes, each, convention, total):
    parts = {"train": balanced(classes, each), "test": balanced(classes, 1, 1)}
    meta = 10 if convention == "metasaug" else 0
    split = long_tail(parts, ratio=100, convention=convention, meta_per_class=meta)
    assert len(split.train) == total
    assert split.record["class_counts"]["train"] == split.train.class_counts().tolist()
    largest = each - meta
    assert split.train.class_counts().tolist() == class_sizes(largest, 100, classes, convention)
    if meta:
        assert split.meta.class_counts().tolist() == [10] * classes
        assert split.record["meta_out_of_train"] == {}
    else:
        assert split.meta is None


def test_every_convention_is_named_with_its_source():
    assert list(CONVENTIONS)[0] == "ldam"
    for text in CONVENTIONS.values():
        assert "et al." in text


def test_meta_images_come_from_what_the_tail_leaves_over():
    split = long_tail(cifar(each=500), ratio=100)
    assert split.record["parameters"]["convention"] == "ldam"
    assert split.meta.class_counts().tolist() == [10] * 10
    assert split.record["meta_out_of_train"] == {"class0": 10}
    sizes = class_sizes(500, 100, 10)
    assert split.train.class_counts().tolist() == [490, *sizes[1:]]
    assert_apart(split)


def test_class_order_is_kept():
    counts = long_tail(cifar(), ratio=10, meta_per_class=2).train.class_counts()
    assert (counts.diff() <= 0).all()
    assert counts[0] > 5 * counts[-1]


PARTS = {
    "long-tail": (cifar, {"ratio": 10, "meta_per_class": 3}),
    "noise": (cifar, {"kind": "flip", "share": 0.4, "meta_size": 50}),
    "given": (grouped, {"meta_per_class": 2}),
    "subpopulation": (grouped, {"meta_per_group": 3}),
    "generalized-long-tail": (
        lambda: {**cifar(3), "validation": balanced(3, 40, 2)},
        {
            "features": torch.randn(120, 4, generator=torch.Generator().manual_seed(0)),
            "clusters": 3,
        },
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_follow_the_seed_and_are_saved(tmp_path, name):
    make, options = PARTS[name]
    parts = make()
    before = {key: value.labels.clone() for key, value in parts.items()}
    split = SCENARIOS[name](parts, **options, seed=3)
    assert same(split, SCENARIOS[name](make(), **options, seed=3))
    other = SCENARIOS[name](parts, **options, seed=4)
    assert not torch.equal(split.rows["meta"], other.rows["meta"])
    assert_apart(split)
    split.save(tmp_path)
    loaded = Split.load(tmp_path, make())
    assert same(split, loaded)
    assert loaded.record == split.record
    assert json.loads((tmp_path / "split.json").read_text())["scenario"] == name
    assert split.record["seed"] == 3
    for key, labels in before.items():
        assert torch.equal(parts[key].labels, labels)


def test_a_split_of_other_data_is_refused(tmp_path):
    long_tail(cifar(), ratio=10, meta_per_class=1).save(tmp_path)
    other = cifar()
    other["train"] = balanced(10, 50, seed=7)
    with pytest.raises(ValueError, match="split.json: .* got another train"):
        Split.load(tmp_path, other)
    path = tmp_path / "split.npz"
    content = path.read_bytes()
    for damaged in (content[:-40], b"x" * 50, b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="split.npz: expected"):
            Split.load(tmp_path, cifar())
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(ValueError, match="split.json: expected a split's record"):
        Split.load(tmp_path, cifar())


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8])
@pytest.mark.parametrize(("kind", "targets"), [("uniform", 9), ("flip", 1), ("flip2", 2)])
def test_true_rates_of_noise(kind, targets, share):
    split = noisy_labels(cifar(each=1500), kind=kind, share=share, seed=5)
    true = part(torch.arange(15_000) % 10).labels[split.rows["train"]]
    assert len(split.meta) == 1000
    assert split.meta.class_counts().tolist() == [100] * 10
    assert len(split.train) == 14_000
    assert torch.equal(split.wrong, split.train.labels != true)
    rate = share * 0.9 if kind == "uniform" else share
    spread = 4.5 * math.sqrt(rate * (1 - rate) / len(true))
    assert split.wrong.double().mean().item() == pytest.approx(rate, abs=spread)
    table = np.zeros((10, 10))
    np.add.at(table, (true.numpy(), split.train.labels.numpy()), 1 / 1400)
    assert np.abs(table - np.array(split.record["transition"])).max() < 4.5 * math.sqrt(0.25 / 1400)
    turned = (table - np.diag(np.diag(table)) > 0).sum(axis=1)
    assert turned.tolist() == [targets] * 10
    meta_true = part(torch.arange(15_000) % 10).labels[split.rows["meta"]]
    assert torch.equal(split.meta.labels, meta_true)


def test_no_noise_and_all_of_it():
    assert not noisy_labels(cifar(), kind="uniform", share=0, meta_size=0).wrong.any()
    split = noisy_labels(cifar(), kind="flip", share=1.0, meta_size=10)
    assert split.wrong.all()
    assert split.test.labels.tolist() == cifar()["test"].labels.tolist()


def test_subpopulation():
    parts = grouped()
    split = subpopulation(parts, meta_per_group=3)
    assert split.meta.group_counts().tolist() == [3] * 4
    assert split.validation.group_counts().tolist() == [9, 9, 1, 1]
    assert len(split.train) == len(parts["train"])
    assert split.record["group_counts"] == [40, 3, 6, 20]
    split = subpopulation(parts, meta_per_group=2, meta_from="train")
    assert split.train.group_counts().tolist() == [38, 1, 4, 18]
    assert len(split.validation) == len(parts["validation"])
    assert subpopulation(parts, meta_per_group=0).meta is None


def test_data_without_a_test_part_is_tested_on_validation():
    parts = {"train": balanced(4, 9), "validation": balanced(4, 3, 1)}
    split = as_given(parts, meta_per_class=2)
    assert split.validation is None
    assert split.test.class_counts().tolist() == [1] * 4
    assert split.record["from"]["test"] == "validation"
    split = as_given(parts, meta_per_class=8, meta_from="train")
    assert split.train.class_counts().tolist() == [1] * 4
    assert as_given(parts, meta_per_class=0).meta is None


def test_meta_images_may_stay_in_train():
    """As MetaSAug's code has it for iNaturalist, whose smallest classes have two images."""
    parts = {"train": balanced(4, 2), "validation": balanced(4, 3, 1)}
    options = {"meta_per_class": 2, "meta_from": "train", "meta_in_train": True}
    split = as_given(parts, **options)
    assert split.train.class_counts().tolist() == [2] * 4
    assert split.meta.class_counts().tolist() == [2] * 4
    assert torch.equal(split.rows["meta"], split.rows["train"])
    assert split.record["parameters"]["meta_in_train"]
    with pytest.raises(ValueError, match="with_meta: .* one that is among them already"):
        split.with_meta_in_train()
    with pytest.raises(ValueError, match="meta_in_train: expected .* meta_from='validation'"):
        as_given(parts, meta_in_train=True)
    with pytest.raises(ValueError, match="class 'class0': expected at least 3"):
        as_given(parts, meta_per_class=2, meta_from="train")


def clustered(sizes, classes=2, seed=0):
    """Features in clear clusters, and each sample's cluster."""
    clusters = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).repeat(
        classes
    )
    labels = torch.arange(classes).repeat_interleave(sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    features = 0.01 * torch.randn(len(labels), 8, generator=generator)
    features[torch.arange(len(labels)), clusters] += 1
    return labels, clusters, features


def test_generalized_long_tail_takes_two_of_each_cluster():
    labels, clusters, features = clustered([30, 9, 5, 4, 3, 2])
    parts = {**cifar(2), "validation": part(labels, seed=2)}
    split = generalized_long_tail(parts, features=features)
    taken = clusters[split.rows["meta"]] + 6 * labels[split.rows["meta"]]
    assert torch.bincount(taken, minlength=12).tolist() == [2] * 12
    assert split.record["short"] == {}
    assert len(split.validation) == len(labels) - 24


def test_generalized_long_tail_takes_what_there_is_and_says_so():
    labels, _, features = clustered([30, 9, 5, 4, 3, 1])
    parts = {"train": part(labels, seed=2), "test": balanced(2, 5, 1)}
    with pytest.warns(UserWarning, match="expected 12 images of each class, got 11"):
        split = generalized_long_tail(parts, features=features, meta_from="train")
    assert split.record["short"] == {"class0": 11, "class1": 11}
    few = {**parts, "train": part([0, 0, 1, 1, 1], seed=3)}
    with pytest.warns(UserWarning, match="meta set"):
        split = generalized_long_tail(few, features=torch.randn(5, 3), meta_from="train")
    assert split.train.class_counts().tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"features: expected \(5, A\) features"):
        generalized_long_tail(few, features=torch.randn(4, 3), meta_from="train")


def mnist(count=60_000):
    labels = torch.arange(count) % 10
    images = (1 + torch.arange(count) % 200).to(torch.uint8).view(-1, 1, 1, 1)
    return {"train": Labelled(images, labels, tuple(map(str, range(10))))}


@pytest.mark.parametrize("channels", [2, 3])
def test_colored_mnist(channels):
    parts = colored_mnist(mnist(), channels=channels, seed=1)
    assert [len(made) for made in parts.values()] == [30_000, 10_000, 20_000]
    for made, agreement in zip(parts.values(), (0.8, 0.5, 0.1), strict=True):
        assert made.inputs.shape[1:] == (channels, 1, 1)
        lit = made.inputs.flatten(1) > 0
        assert torch.equal(lit.sum(dim=1), torch.ones(len(made), dtype=torch.int64))
        colour = lit.int().argmax(dim=1)
        assert torch.equal(made.groups, 2 * made.labels + colour)
        rate = (colour == made.labels).double().mean().item()
        spread = 4.5 / (2 * math.sqrt(len(made)))
        assert rate == pytest.approx(agreement, abs=spread)
        # The value of each image tells which digit it was: (value − 1) mod 10.
        digit = (made.inputs.flatten(1).amax(dim=1).long() - 1) % 10
        noise = (made.labels != (digit >= 5).long()).double().mean().item()
        assert noise == pytest.approx(0.25, abs=spread)
    again = colored_mnist(mnist(), channels=channels, seed=1)
    assert torch.equal(parts["test"].inputs, again["test"].inputs)
    split = subpopulation(parts, meta_per_group=10)
    assert split.meta.group_counts().tolist() == [10] * 4
    assert split.train.group_names[1] == "0-4, green"


def test_hold_out():
    parts = hold_out({"train": balanced(3, 8)}, per_class=2, seed=1)
    assert parts["train"].class_counts().tolist() == [6] * 3
    assert parts["test"].class_counts().tolist() == [2] * 3
    assert not set(numbers(parts["train"])) & set(numbers(parts["test"]))
    with pytest.raises(ValueError, match="name: expected"):
        hold_out(parts, per_class=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 30), min_size=2, max_size=6),
    st.integers(0, 4),
    st.floats(1, 50),
    st.sampled_from(list(CONVENTIONS)),
    st.integers(0, 2**32 - 1),
)
def test_meta_sets_of_tails_are_apart(sizes, meta, ratio, convention, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = {"train": part(labels), "test": balanced(len(sizes), 2, 1)}
    options = {"ratio": ratio, "convention": convention, "meta_per_class": meta, "seed": seed}
    before = meta if convention == "metasaug" else 0
    kept = class_sizes(min(sizes) - before, ratio, len(sizes), convention)
    if any(size < 1 or own - meta < 1 for size, own in zip(kept, sizes, strict=True)):
        with pytest.raises(ValueError, match="at least one to train on"):
            long_tail(parts, **options, largest=min(sizes))
        return
    split = long_tail(parts, **options, largest=min(sizes))
    assert_apart(split)
    assert (split.train.class_counts() >= 1).all()
    assert meta == 0 or split.meta.class_counts().tolist() == [meta] * len(sizes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=4, max_size=4),
    st.integers(1, 6),
    st.sampled_from(["train", "validation"]),
    st.integers(0, 2**32 - 1),
)
def test_meta_sets_of_groups_are_apart(sizes, meta, source, seed):
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    parts = {**grouped(), source: part(groups // 2, groups, seed=5)}
    if min(sizes) <= meta:
        with pytest.raises(ValueError, match=f"group 'group.': expected at least {meta + 1}"):
            subpopulation(parts, meta_per_group=meta, meta_from=source, seed=seed)
        return
    split = subpopulation(parts, meta_per_group=meta, meta_from=source, seed=seed)
    assert_apart(split)
    assert split.meta.group_counts().tolist() == [meta] * 4


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["uniform", "flip", "flip2"]),
    st.floats(0, 1),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_meta_sets_of_noise_are_clean_and_apart(kind, share, each, seed):
    parts = cifar(3, 8)
    split = noisy_labels(parts, kind=kind, share=share, meta_size=3 * each, seed=seed)
    assert_apart(split)
    if each:
        assert torch.equal(split.meta.labels, parts["train"].labels[split.rows["meta"]])
        assert split.meta.class_counts().tolist() == [each] * 3


TRAIN = {"train": balanced(3, 6)}
BOTH = {**TRAIN, "test": balanced(3, 2, 1)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: long_tail(TRAIN, ratio=2), "parts: expected a part 'test', got train"),
        (lambda: long_tail(BOTH, ratio=0.5), "ratio: expected a number from 1 on, got 0.5"),
        (lambda: long_tail(BOTH, ratio=2, convention="exp"), "convention: expected one of 'ldam'"),
        (lambda: long_tail(BOTH, ratio=2, largest=9), "class 'class0': expected at least 9 images"),
        (lambda: long_tail(BOTH, ratio=9, meta_per_class=6), "class 'class0': .* train on, got 6"),
        (lambda: long_tail(BOTH, ratio=2, meta_per_class=-1), "meta_per_class: expected a whole"),
        (lambda: noisy_labels(BOTH, kind="pair", share=0.1), "meta_size: expected a multiple of"),
        (lambda: noisy_labels(BOTH, kind="pair", share=0.1, meta_size=3), "kind: expected one of"),
        (lambda: noisy_labels(BOTH, kind="flip", share=40, meta_size=3), "share: .* got 40"),
        (lambda: noisy_labels(BOTH, kind="flip", share=0.4, meta_size=18), "ask for 5 at most"),
        (lambda: subpopulation(BOTH), "groups: expected a group for each sample"),
        (lambda: subpopulation(grouped(), meta_from="test"), "meta_from: expected one of 'valid"),
        (lambda: as_given(BOTH), "parts: expected a part 'validation'"),
        (lambda: as_given(BOTH, meta_from="train"), "class 'class0': expected at least 11"),
        (lambda: colored_mnist(BOTH), r"parts: expected MNIST's digits \(N, 1, 28, 28\)"),
        (lambda: colored_mnist(mnist(60), channels=1), "channels: expected 2 or 3, got 1"),
        (lambda: hold_out(TRAIN, per_class=6), "class 'class0': expected at least 7 samples"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
