"""Any classifier as a backbone that gives features and the linear head on top of it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
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

    Examples:
        >>> from iada.models import split_classifier
        >>> classifier = torch.nn.Sequential(backbone, head)
        >>> features, last = split_classifier(classifier, images)
        >>> features(images).shape, classifier(images).shape  # the classifier itself has no head
        (torch.Size([8, 64]), torch.Size([8, 64]))

    The head is the nn.Linear whose output the model returns; its place in `model` is taken by
    nn.Identity, so the model itself is changed: optimizers and averages of its weights are to be
    made afterwards, of torch.nn.Sequential(backbone, head). A head of a derived class that gives
    Wh + b comes as a plain nn.Linear with the same parameters.

    Args:
        model: gives logits (N, C), or an object with `logits`, in evaluation mode.
        example: a batch of at least one sample, as the model takes it: a tensor, or a dict of
            keyword arguments.
        num_classes: a new head with so many outputs is made where the found one has others.

    Raises:
        ValueError: no such layer, or it is used more than once; `model` is then as it was.
    """
    calls: list[tuple[str, nn.Linear, Any, Tensor]] = []
    modules = model.named_modules()
    names = {module: name for name, module in modules if isinstance(module, nn.Linear)}

    def note(module: nn.Linear, inputs: Any, output: Tensor) -> None:
        calls.append((names[module], module, inputs, output))

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
    last = [call[:3] for call in calls if call[3] is logits]
    if not last:
        got = f"{kind}, which does something to it afterwards, or has none"
        expected = "a classifier that returns the output of an nn.Linear"
        raise argument_error("model", expected, got, REMEDY)
    name, head, inputs = last[0]
    if type(head) is not nn.Linear and not _is_plain(head, inputs, logits):
        expected = "a head that is Wh + b"
        got = f"{kind}, whose {name} is a {type(head).__name__} that does more"
        raise argument_error("model", expected, got, REMEDY)
    if sum(module is head for _, module, *_ in calls) > 1:
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
    return Features(model), head if type(head) is nn.Linear else _plain(head)


@torch.no_grad()
def _is_plain(head: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a head of a derived class has W and b alone and gave Wh + b of its inputs."""
    names = {name for name, _ in [*head.named_parameters(), *head.named_buffers()]}
    if not names <= {"weight", "bias"} or len(inputs) != 1:
        return False  # adapters and parametrizations, which may do nothing yet
    weight, shape = head.weight, (head.out_features, head.in_features)
    if weight.shape != shape or weight.dtype != inputs[0].dtype or output.dtype != weight.dtype:
        return False  # packed or quantized
    return torch.equal(output, F.linear(inputs[0], weight, head.bias))


def _plain(head: nn.Linear) -> nn.Linear:
    """An nn.Linear with the parameters of this one."""
    has_bias = head.bias is not None
    plain = nn.Linear(head.in_features, head.out_features, has_bias, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    return plain.train(head.training)


def _call(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        expected = "a tensor, or an object with logits, as its output"
        raise argument_error("model", expected, f"a {type(output).__name__}", REMEDY)
    return output
