"""Data sets that are biased as they come: a meta set is taken out, the rest stays as it was read.

ImageNet-LT, Places-LT and iNaturalist have long tails of their own; ImageNet-GLT and MSCOCO-GLT
have tails within the classes too; Waterbirds, CelebA, CivilComments and Colored MNIST have groups.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.files import required
from iada.experiments.datasets.labelled import Labelled, Parts
from iada.experiments.scenarios.sampling import Picked, Pieces, part_of, pick_evenly, picked
from iada.experiments.scenarios.split import Split, requested
from iada.utils.checks import argument_error, check_choice, check_count, check_sizes

SOURCES = ("validation", "train")


def as_given(
    parts: Parts,
    *,
    meta_per_class: int = 10,
    meta_from: str = "validation",
    meta_in_train: bool = False,
    seed: int = 0,
) -> Split:
    """The parts as they were read, less a meta set of `meta_per_class` images a class (0: none).

    They come out of the validation images, or the training images, which keep one of each class
    at least. A data set without a test part (iNaturalist 2018) is tested on what is left of its
    validation part, and has no validation set then.

    meta_in_train: images that come out of the training images stay there too, as MetaSAug's code
    has it for iNaturalist (Li et al., 2021), whose smallest classes have two images.
    """
    check_count("meta_per_class", meta_per_class, 0)
    source = _source(parts, meta_from) if meta_per_class else None
    request = requested("given", seed, meta_per_class=meta_per_class, meta_from=meta_from)
    if meta_in_train:
        if meta_from != "train":
            expected = "meta images out of the training images to stay there"
            got = f"meta_from={meta_from!r}"
            raise argument_error("meta_in_train", expected, got, "pass meta_from='train'")
        request["parameters"] |= {"meta_in_train": True}
    if source is None:
        return _split(parts, meta_from, None, request)
    all_used = meta_in_train or (meta_from == "validation" and "test" in parts)
    spare = 0 if all_used else 1
    rng = np.random.default_rng(seed)
    names = source.class_names
    chosen = pick_evenly(
        source.labels, names, meta_per_class, rng, "class", "meta_per_class", spare
    )
    if meta_in_train:
        chosen = chosen._replace(left=torch.arange(len(source)))
    return _split(parts, meta_from, chosen, request)


def subpopulation(
    parts: Parts, *, meta_per_group: int = 10, meta_from: str = "validation", seed: int = 0
) -> Split:
    """The data set's own parts, with groups; a meta set of as many samples of each group.

    The published experiments do not say how large their meta sets are: ten of each group, out of
    the validation samples, is this project's choice. What is left of them is the validation set,
    on which the epoch with the best worst-group accuracy is chosen. meta_from="train" takes them
    out of the training samples, of which each group keeps one at least. meta_per_group=0: none.
    """
    check_count("meta_per_group", meta_per_group, 0)
    for name in ("train", "test"):
        part_of(parts, name).grouped()
    request = requested("subpopulation", seed, meta_per_group=meta_per_group, meta_from=meta_from)
    request["group_counts"] = parts["train"].group_counts().tolist()
    chosen = None
    if meta_per_group:
        source = _source(parts, meta_from)
        rng = np.random.default_rng(seed)
        groups, names = source.grouped(), source.group_names
        chosen = pick_evenly(groups, names, meta_per_group, rng, "group", "meta_per_group", spare=1)
    return _split(parts, meta_from, chosen, request)


def generalized_long_tail(
    parts: Parts,
    *,
    features: Tensor,
    clusters: int = 6,
    meta_per_cluster: int = 2,
    meta_from: str = "validation",
    seed: int = 0,
) -> Split:
    """A meta set balanced over classes and, within each, over clusters of pre-trained features.

    The images of each class are parted by KMeans into `clusters`, and `meta_per_cluster` of each
    are taken (Tang et al., 2022). A class or cluster with fewer gives what it has, but for one
    image of the class if they come out of the training images; a warning and the record's "short"
    say so.

    features: (N, A), a row for each sample of the part `meta_from`.
    """
    check_count("clusters", clusters)
    check_count("meta_per_cluster", meta_per_cluster)
    source = _source(parts, meta_from)
    check_sizes("features", features, f"({len(source)}, A) features", (len(source), None))
    rng = np.random.default_rng(seed)
    taken, short = [], {}
    table = features.detach().cpu().double().numpy()
    for c in range(source.num_classes):
        class_rows = (source.labels == c).nonzero().flatten()
        rows = _one_class(class_rows, table[class_rows.numpy()], clusters, meta_per_cluster, rng)
        rows = rows[: len(class_rows) - (meta_from == "train")]
        if len(rows) < clusters * meta_per_cluster:
            short[source.class_names[c]] = len(rows)
        taken.append(rows)
    if empty := [name for name, count in short.items() if not count]:
        expected = "an image of each class for the meta set"
        got = f"none of {empty[0]} and {len(empty) - 1} others"
        raise argument_error(f"parts[{meta_from!r}]", expected, got, "pass meta_from='train'")
    if short:
        warnings.warn(
            f"meta set: expected {clusters * meta_per_cluster} images of each class, got "
            f"{min(short.values())} or more of {len(short)} classes with too few",
            stacklevel=2,
        )
    asked = {"clusters": clusters, "meta_per_cluster": meta_per_cluster, "meta_from": meta_from}
    request = requested("generalized-long-tail", seed, **asked) | {"short": short}
    return _split(parts, meta_from, picked(torch.cat(taken), len(source)), request)


def _one_class(
    class_rows: Tensor, features: np.ndarray, clusters: int, each: int, rng: np.random.Generator
) -> Tensor:
    """Up to `each` rows of each cluster of one class, the clusters in turn."""
    cluster = required("sklearn.cluster", "clusters need scikit-learn: pip install 'iada[paper]'")
    if not len(class_rows):
        return class_rows
    count = min(clusters, len(np.unique(features, axis=0)))
    state = int(rng.integers(2**31))
    assigned = cluster.KMeans(count, n_init=10, random_state=state).fit(features).labels_
    order = rng.permutation(len(class_rows))
    rounds = [order[assigned[order] == cluster] for cluster in range(count)]
    turns = [rows[turn] for turn in range(each) for rows in rounds if turn < len(rows)]
    return class_rows[torch.tensor(turns)]


def _source(parts: Parts, meta_from: str) -> Labelled:
    check_choice("meta_from", meta_from, SOURCES, "the test part is not to be touched")
    return part_of(parts, meta_from)


def _split(parts: Parts, meta_from: str, chosen: Picked | None, request: dict[str, Any]) -> Split:
    """All rows of every part, but for those chosen for the meta set."""
    pieces: Pieces = {name: (name, torch.arange(len(part))) for name, part in parts.items()}
    part_of(parts, "train")
    if chosen is not None:
        pieces[meta_from] = (meta_from, chosen.left)
        pieces["meta"] = (meta_from, chosen.taken)
    if "test" not in pieces:
        part_of(parts, "validation")
        pieces["test"] = pieces.pop("validation")
    if (validation := pieces.get("validation")) and not len(validation[1]):
        del pieces["validation"]  # all of it went into the meta set
    return Split.of(parts, pieces, request)
