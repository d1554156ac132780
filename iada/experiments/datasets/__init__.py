"""Readers of the standard data sets, from a path that the user gives; nothing is downloaded.

Every reader takes a path, or None if it is among BUNDLED, and returns {"train", "validation",
"test": Labelled}, as far as the data set has them. Errors name the file and the line, and nothing
is half loaded.
"""

from collections.abc import Callable

from iada.experiments.datasets.cifar import read_cifar10, read_cifar100
from iada.experiments.datasets.digits import read_digits
from iada.experiments.datasets.features import read_features
from iada.experiments.datasets.glt import read_glt
from iada.experiments.datasets.image_files import read_folder, read_lists
from iada.experiments.datasets.labelled import Labelled
from iada.experiments.datasets.mnist import read_mnist
from iada.experiments.datasets.own import read_own
from iada.experiments.datasets.subpopulations import (
    read_celeba,
    read_civilcomments,
    read_waterbirds,
)
from iada.experiments.datasets.views import (
    CIFAR10,
    CIFAR100,
    IMAGENET,
    NORMALISATIONS,
    FeatureView,
    FileView,
    MemoryView,
    TextView,
    load_tokenizer,
)

READERS: dict[str, Callable[..., dict[str, Labelled]]] = {
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "folder": read_folder,
    "lists": read_lists,
    "mnist": read_mnist,
    "waterbirds": read_waterbirds,
    "celeba": read_celeba,
    "civilcomments": read_civilcomments,
    "glt": read_glt,
    "digits": read_digits,
    "features": read_features,
    "own": read_own,
}
BUNDLED = ("digits",)  # readers that need no path

__all__ = [
    "BUNDLED",
    "CIFAR10",
    "CIFAR100",
    "IMAGENET",
    "NORMALISATIONS",
    "READERS",
    "FeatureView",
    "FileView",
    "Labelled",
    "MemoryView",
    "TextView",
    "load_tokenizer",
    *(reader.__name__ for reader in READERS.values()),
]
