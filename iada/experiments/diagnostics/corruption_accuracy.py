"""How a classifier fares on corrupted test images, by corruption and severity."""

from collections.abc import Callable
from typing import Any

from iada.experiments.datasets import Labelled
from iada.experiments.datasets.corruptions import MadeCorruptions, PublishedCorruptions
from iada.experiments.datasets.corruptions.published import EXTRA

Source = MadeCorruptions | PublishedCorruptions


def corruption_accuracy(accuracy: Callable[[Labelled], float], source: Source) -> dict[str, Any]:
    """For a run's record: how the images were made; "clean", "accuracy" by name, and "mean".

    accuracy: the share of right answers on some data. "clean" is that on `source.test`, and the
    mean is over severities and corruptions alike, of published ones those of the benchmark, which
    are named "in_mean".
    """
    by_name: dict[str, list[float]] = {}
    for name, data in source:
        by_name.setdefault(name, []).append(accuracy(data))
    extra = EXTRA if isinstance(source, PublishedCorruptions) else ()
    in_mean = [name for name in by_name if name not in extra] or list(by_name)
    values = [value for name in in_mean for value in by_name[name]]
    return {
        **source.about,
        "images": len(source.test),
        "clean": accuracy(source.test),
        "accuracy": by_name,
        "in_mean": in_mean,
        "mean": sum(values) / len(values),
    }
