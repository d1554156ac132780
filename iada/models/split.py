"""Any classifier as a backbone that gives features and the linear head on top of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iada.utils.checks import argument_error

REMEDY = "write the two yourself: a module that returns features (N, A), and its last nn.Linear"


class Features(nn.Module):
    """A classifier whose last layer is gone: what it gave as logits are its features (N, A).

    Inputs are a tensor, or a dict of keyword arguments (a tokenizer's output).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        """Inputs of N samples → features (N, A)."""
        return _call(self.model, inputs)


def split_classifier(
    model: nn.Module, example: Any, num_classes: int | None = None
) -> tuple[Features, nn.Linear]:
    """Backbone and head of a classifier, found by running it once on `example`.

    The head is the nn.Linear whose output the model returns; its place in `model` is taken by
    nn.Identity, so the model itself is changed.

    Args:
        model: gives logits (N, C), or an object with `logits`, in evaluation mode.
        example: a batch of at least one sample, as the model takes it: a tensor, or a dict of
            keyword arguments.
        num_classes: a new head with so many outputs is made where the found one has others.

    Raises:
        ValueError: no such layer, or it is used more than once; `model` is then as it was.
    """
    calls: list[tuple[str, nn.Linear, Tensor]] = []
    names = {module: name for name, module in model.named_modules() if type(module) is nn.Linear}

    def note(module: nn.Linear, inputs: Any, output: Tensor) -> None:
        calls.append((names[module], module, output))

    hooks = [module.register_forward_hook(note) for module in names]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            logits = _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module in was_training:
            module.training = True
    kind = type(model).__name__
    last = [(name, module) for name, module, output in calls if output is logits]
    if not last:
        got = f"{kind}, which does something to it afterwards, or has none"
        expected = "a classifier that returns the output of an nn.Linear"
        raise argument_error("model", expected, got, REMEDY)
    name, head = last[0]
    if sum(module is head for _, module, _ in calls) > 1:
        expected = "a head used once"
        raise argument_error("model", expected, f"{kind}, which uses {name} again", REMEDY)
    if logits.dim() != 2:
        got = f"{kind} with logits of shape {tuple(logits.shape)}"
        raise argument_error("model", "one row of logits a sample, (N, C)", got, REMEDY)
    others = [p for m in model.modules() if m is not head for p in m.parameters(recurse=False)]
    if any(p is q for p in head.parameters() for q in others):
        got = f"{kind}, which shares the weight of {name} with another layer"
        raise argument_error("model", "a head with a weight of its own", got, REMEDY)
    if not name:
        raise argument_error("model", "layers before its nn.Linear", "an nn.Linear alone", REMEDY)
    model.set_submodule(name, nn.Identity())
    if num_classes is not None and head.out_features != num_classes:
        head = nn.Linear(head.in_features, num_classes).to(head.weight)
    return Features(model), head


def _call(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        expected = "a tensor, or an object with logits, as its output"
        raise argument_error("model", expected, f"a {type(output).__name__}", REMEDY)
    return output
