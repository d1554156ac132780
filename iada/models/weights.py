"""Weights of a file in a backbone and its head."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iada.utils.checks import argument_error
from iada.utils.files import load_plain


def load_weights(backbone: nn.Module, head: nn.Linear, path: str | Path) -> bool:
    """Load a state dict into `backbone`, and into `head` where the file has one of its shape.

    The file is what `torch.save` wrote of a state dict, or of nested dicts with one inside: a
    checkpoint of `iada.Trainer`, a first phase, one of DistributedDataParallel ("module." before
    each name), cRT's. It is read without running code. BatchNorm's number of batches may be absent.

    Returns whether the head was loaded. Raises ValueError for a file that cannot be read or has
    not all weights of the backbone; nothing is changed then.
    """
    remedy = "pass what torch.save wrote of a state dict"
    content = load_plain(Path(path), "a file of weights", remedy)
    tensors = dict(_named_tensors(content, ""))
    state = _state_of(backbone, tensors)
    if state is None:
        first = next(iter(backbone.state_dict()))
        got = f"{len(tensors)} tensors, not all that begin or end as {first!r}"
        raise argument_error(path, "the weights of this backbone", got, "pass its own file")
    backbone.load_state_dict(state, strict=False)
    shaped = [name for name, tensor in tensors.items() if tensor.shape == head.weight.shape]
    weights = [name for name in shaped if name.endswith("weight")]
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


def _state_of(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The backbone's state among tensors whose names have one and the same prefix more."""
    shapes = {name: value.shape for name, value in backbone.state_dict().items()}
    needed = [name for name in shapes if not name.endswith("num_batches_tracked")]
    for wrapper in ("", "model."):  # `split_classifier` keeps the model under this name
        inner = needed[0].removeprefix(wrapper)
        for candidate in tensors:
            if candidate != inner and not candidate.endswith(f".{inner}"):
                continue
            prefix = candidate.removesuffix(inner)
            keys = {name: prefix + name.removeprefix(wrapper) for name in shapes}
            state = {name: tensors[key] for name, key in keys.items() if key in tensors}
            if all(name in state and state[name].shape == shapes[name] for name in needed):
                return state
    return None
