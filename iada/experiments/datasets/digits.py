"""scikit-learn's digits: 8×8 scans that come with the library, so that nothing has to be found."""

import os

import numpy as np
import torch

from iada.experiments.datasets.files import required
from iada.experiments.datasets.labelled import Labelled

# Images of each class. The rarest digit has 174; what a digit has beyond these is left out.
SIZES = {"test": 50, "validation": 20, "train": 104}
LEVELS = 16  # of grey


def read_digits(path: str | os.PathLike | None = None) -> dict[str, Labelled]:
    """Train, validation and test digits, uint8 (N, 1, 8, 8): 104, 20 and 50 images of each class.

    The parts are drawn at random, once for all seeds of an experiment: no test image is in the
    training, meta or validation set of any seed. path: not used; the images are scikit-learn's.

    Raises ImportError without scikit-learn.
    """
    hint = "the digits are scikit-learn's: pip install 'iada[demo]'"
    digits = required("sklearn.datasets", hint).load_digits()
    names = tuple(str(name) for name in digits.target_names)
    images = torch.from_numpy(np.rint(digits.images[:, None] * (255 / LEVELS)).astype(np.uint8))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    every = Labelled(images, labels, names)
    rng = np.random.default_rng(0)
    by_class = []
    for c in range(len(names)):
        shuffled = torch.from_numpy(rng.permutation(np.flatnonzero(digits.target == c)))
        by_class.append(shuffled[: sum(SIZES.values())].split(list(SIZES.values())))
    rows = map(torch.cat, zip(*by_class, strict=True))
    return {part: every.subset(chosen) for part, chosen in zip(SIZES, rows, strict=True)}
