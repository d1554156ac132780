"""Training labels made wrong, as Meta-WeightNet and its successors do (Shu et al., 2019)."""

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.labelled import Parts
from iada.experiments.scenarios.sampling import part_of, pick_evenly, training_pieces
from iada.experiments.scenarios.split import Split, requested
from iada.utils.checks import argument_error, check_choice, check_count

KINDS = {
    "uniform": "a share p of the labels redrawn over all K classes: p(1 − 1/K) of them are wrong",
    "flip": "a share p of each class's labels turned into one other class",
    "flip2": "a share p/2 of each class's labels turned into each of two other classes",
}


def transition(kind: str, share: float, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """(K, K): the chance that a label of the row's class becomes the column's."""
    check_choice("kind", kind, [*KINDS])
    if not 0 <= share <= 1:
        remedy = "pass a share, not percent"
        raise argument_error("share", "a number in [0, 1]", repr(share), remedy)
    if kind == "uniform":
        table = np.full((num_classes, num_classes), share / num_classes)
        return table + (1 - share) * np.eye(num_classes)
    targets = 1 if kind == "flip" else 2
    if num_classes <= targets:
        expected = f"a data set of more than {targets} classes for {kind}"
        raise argument_error("parts", expected, f"{num_classes}", "choose another kind of noise")
    table = (1 - share) * np.eye(num_classes)
    for c in range(num_classes):
        others = np.delete(np.arange(num_classes), c)
        table[c, rng.choice(others, targets, replace=False)] = share / targets
    return table


def noisy_labels(
    parts: Parts, *, kind: str, share: float, meta_size: int = 1000, seed: int = 0
) -> Split:
    """Noise in the training labels; a clean meta set, balanced over classes, out of train.

    Each training label is drawn anew, by itself, from the row of its class in `transition`: of a
    share p about a share p becomes wrong, and `Split.wrong` marks which. meta_size: images of the
    meta set over all classes, a multiple of their number; 0: none. Test and validation stay clean.
    """
    train, _ = part_of(parts, "train"), part_of(parts, "test")
    check_count("meta_size", meta_size, 0)
    each, rest = divmod(meta_size, train.num_classes)
    if rest:
        expected = f"a multiple of the {train.num_classes} classes"
        remedy = f"pass {each * train.num_classes or train.num_classes}"
        raise argument_error("meta_size", expected, meta_size, remedy)
    rng = np.random.default_rng(seed)
    table = transition(kind, share, train.num_classes, rng)
    if each:
        meta, train_rows = pick_evenly(
            train.labels, train.class_names, each, rng, "class", "meta_size", spare=1
        )
    else:
        meta, train_rows = torch.empty(0, dtype=torch.int64), torch.arange(len(train))
    request = requested("noise", seed, kind=kind, share=share, meta_size=meta_size)
    request["transition"] = table.tolist()
    pieces = training_pieces(parts, train_rows, meta)
    return Split.of(parts, pieces, request, _drawn(train.labels[train_rows], table, rng))


def _drawn(labels: Tensor, table: np.ndarray, rng: np.random.Generator) -> Tensor:
    """For each label one drawn from its class's row of the table."""
    edges = table.cumsum(axis=1)
    edges[:, -1] = 1.0
    chances = rng.random(len(labels))
    return torch.from_numpy((chances[:, None] >= edges[labels.numpy()]).sum(axis=1))
