"""How a classifier fares on corrupted test images, by corruption and severity."""

from collections.abc import Callable
from typing import Any

from iada.experiments.datasets import Labelled
from iada.experiments.datasets.corruptions import MadeCorruptions, PublishedCorruptions

Source = MadeCorruptions | PublishedCorruptions


def corruption_accuracy(accuracy: Callable[[Labelled], float], source: Source) -> dict[str, Any]:
    """For a run's record: how the images were made; "clean", "accuracy" by name, and "mean".

    accuracy: the share of right answers on some data. "clean" is that on `source.test`, and the
    mean is over corruptions and severities alike.
    """
    by_name: dict[str, list[float]] = {}
    for name, data in source:
        by_name.setdefault(name, []).append(accuracy(data))
    values = [value for row in by_name.values() for value in row]
    return {
        **source.about,
        "images": len(source.test),
        "clean": accuracy(source.test),
        "accuracy": by_name,
        "mean": sum(values) / len(values),
    }
