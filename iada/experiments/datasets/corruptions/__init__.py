"""Test images made worse in the usual ways, for evaluation out of distribution."""

from iada.experiments.datasets.corruptions.made import (
    CORRUPTIONS,
    SEVERITIES,
    MadeCorruptions,
    corrupted,
)
from iada.experiments.datasets.corruptions.published import PublishedCorruptions

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "MadeCorruptions",
    "PublishedCorruptions",
    "corrupted",
]
