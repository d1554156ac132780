"""Biased learning as functions of (data set, parameters, seed): each returns a `Split`.

The meta set is clean and balanced, and shares no sample with train, validation or test.
"""

from collections.abc import Callable

from iada.experiments.scenarios.derived import colored_mnist, hold_out
from iada.experiments.scenarios.long_tail import CONVENTIONS, class_sizes, long_tail
from iada.experiments.scenarios.noise import noisy_labels
from iada.experiments.scenarios.official_split import as_given, generalized_long_tail, subpopulation
from iada.experiments.scenarios.split import Split

SCENARIOS: dict[str, Callable[..., Split]] = {
    "long-tail": long_tail,
    "given": as_given,
    "generalized-long-tail": generalized_long_tail,
    "noise": noisy_labels,
    "subpopulation": subpopulation,
}

__all__ = [
    "CONVENTIONS",
    "SCENARIOS",
    "Split",
    "as_given",
    "class_sizes",
    "colored_mnist",
    "generalized_long_tail",
    "hold_out",
    "long_tail",
    "noisy_labels",
    "subpopulation",
]
