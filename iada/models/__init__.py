"""Backbones from inputs to features (N, A), each with its head: built in, or by a library."""

from iada.models.factory import BUILT_IN, build_backbone
from iada.models.small import cifar_resnet, mlp, resnet32, wide_resnet
from iada.models.split import split_classifier
from iada.models.weights import load_weights

__all__ = [
    "BUILT_IN",
    "build_backbone",
    "cifar_resnet",
    "load_weights",
    "mlp",
    "resnet32",
    "split_classifier",
    "wide_resnet",
]
