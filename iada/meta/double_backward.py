"""The hypergradient as published code takes it: a graph of the gradient, differentiated again.

The oracle of the faster ways: exact for every backbone that autograd differentiates twice, at
three times the memory of a plain step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.backbone_passes import BackbonePasses
from iada.meta.learner import ShardedBatch, check_meta_loss
from iada.meta.options import VirtualStep


def double_backward(
    loss: Tensor,
    wanted: Sequence[Tensor],
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    virtual: VirtualStep,
    passes: BackbonePasses,
    head: nn.Linear,
    meta_rows: ShardedBatch,
) -> tuple[Tensor, list[Tensor]]:
    """CE on the meta batch at φ̄, and its gradients by `wanted`, zeros where it has none.

    Args:
        loss: Eq. 6 of the training batch, as a graph of `trained` and `wanted`.
        trained: the parameters that the virtual step moves.
        others: as in `MetaIADA`.
    """
    found = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
    gradients = {p: g for p, g in zip(trained, found, strict=True) if g is not None}
    moved: Mapping[Any, Tensor] = {
        parameter: value for parameter, (value, _) in virtual.take(optimizer, gradients).items()
    }
    named = passes.backbone.named_parameters()
    features = passes.forward_frozen(
        meta_rows.inputs, {name: moved[p] for name, p in named if p in moved}
    )
    weight = moved.get(head.weight, head.weight)
    bias = None if head.bias is None else moved.get(head.bias, head.bias)
    meta_loss = F.cross_entropy(F.linear(features.to(weight.dtype), weight, bias), meta_rows.labels)
    check_meta_loss(meta_loss.detach())
    grads = torch.autograd.grad(meta_loss, wanted, allow_unused=True)
    return meta_loss.detach(), [
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip(wanted, grads, strict=True)
    ]
