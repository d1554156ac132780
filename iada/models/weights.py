"""Weights of a file in a backbone and its head."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iada.utils.checks import argument_error
from iada.utils.files import load_plain

HEADS = {"head", "fc", "classifier"}  # what a last layer, or what holds it, is commonly called


def load_weights(backbone: nn.Module, head: nn.Linear, path: str | Path) -> bool:
    """Load a state dict into `backbone`, and into `head` where the file has one of its shape.

    The file is what `torch.save` wrote of a state dict, or of nested dicts with one inside: a
    checkpoint of `iada.Trainer`, a first phase, one of DistributedDataParallel ("module." before
    each name), cRT's. It is read without running code. BatchNorm's number of batches may be absent.

    The head is the one weight of its shape beside the backbone's; of several, the one that a module
    named head, fc or classifier has.

    Returns whether the head was loaded; if not, it is as it was, and still to be trained. Raises
    ValueError for a file that cannot be read or has not all weights of the backbone; nothing is
    changed then.
    """
    remedy = "pass what torch.save wrote of a state dict"
    content = load_plain(Path(path), "a file of weights", remedy)
    tensors = dict(_named_tensors(content, ""))
    keys = _keys_of(backbone, tensors)
    if keys is None:
        first = next(iter(backbone.state_dict()))
        got = f"{len(tensors)} tensors, not all that begin or end as {first!r}"
        raise argument_error(path, "the weights of this backbone", got, "pass its own file")
    backbone.load_state_dict({name: tensors[key] for name, key in keys.items()}, strict=False)
    others = tensors.keys() - set(keys.values())
    shaped = [name for name in others if tensors[name].shape == head.weight.shape]
    weights = [name for name in shaped if name.endswith("weight")]
    weights = [name for name in weights if HEADS & set(name.split("."))] or weights
    bias = tensors.get(f"{weights[0].removesuffix('weight')}bias") if len(weights) == 1 else None
    if len(weights) != 1 or (bias is None) != (head.bias is None):
        return False
    with torch.no_grad():
        head.weight.copy_(tensors[weights[0]])
        if bias is not None:
            head.bias.copy_(bias)
    return True


def _named_tensors(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _named_tensors(value, f"{prefix}{name}.")


def _keys_of(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """The backbone's state by its names among tensors, which have one and the same prefix more."""
    shapes = {name: value.shape for name, value in backbone.state_dict().items()}
    needed = [name for name in shapes if not name.endswith("num_batches_tracked")]
    for wrapper in ("", "model."):  # `split_classifier` keeps the model under this name
        inner = needed[0].removeprefix(wrapper)
        for candidate in tensors:
            if candidate != inner and not candidate.endswith(f".{inner}"):
                continue
            prefix = candidate.removesuffix(inner)
            keys = {name: prefix + name.removeprefix(wrapper) for name in shapes}
            keys = {name: key for name, key in keys.items() if key in tensors}
            if all(name in keys and tensors[keys[name]].shape == shapes[name] for name in needed):
                return keys
    return None
