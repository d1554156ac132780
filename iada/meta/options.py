"""How a meta step is computed: what the bilevel methods offer, and the step of Eq. 7."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iada.meta.scope import Scope, check_scope
from iada.utils.checks import argument_error, check_choice, check_count


@dataclass(frozen=True)
class VirtualStep:
    """Which parts of plain SGD with momentum the virtual step has.

    The learning rate is the parameter's current one in the optimizer. momentum adds the buffers,
    damping and Nesterov rule of torch.optim.SGD; weight_decay adds the decay. Both change where the
    meta loss is looked at; neither depends on Ω or Σ.
    """

    momentum: bool = False
    weight_decay: bool = False

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ValueError for momentum with an optimizer that is not SGD."""
        if self.momentum and not isinstance(optimizer, torch.optim.SGD):
            expected = "torch.optim.SGD as the optimizer"
            remedy = "leave it False: the virtual step is then plain SGD at the optimizer's lr"
            got = f"a {type(optimizer).__name__}"
            raise argument_error("virtual_momentum", expected, got, remedy)

    def take(
        self, optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor]
    ) -> dict[Tensor, tuple[Tensor, Any]]:
        """φ̄ of each parameter that has a gradient, and dφ̄/d∇, a number or a tensor ()."""
        taken: dict[Tensor, tuple[Tensor, Any]] = {}
        for group in optimizer.param_groups:
            decay = group.get("weight_decay", 0.0) if self.weight_decay else 0.0
            for parameter in group["params"]:
                if parameter not in gradients:
                    continue
                step, slope = gradients[parameter], 1.0
                if decay:
                    step = step.add(parameter.detach(), alpha=decay)
                if self.momentum and group["momentum"]:
                    step, slope = _with_momentum(step, group, optimizer.state.get(parameter, {}))
                moved = parameter.detach() - group["lr"] * step
                taken[parameter] = (moved, -group["lr"] * slope)
        return taken


def _with_momentum(
    step: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """The direction of SGD's step and its derivative by the gradient; the buffer stays as it is."""
    momentum, share = group["momentum"], 1.0
    buffer, mixed = state.get("momentum_buffer"), step
    if buffer is not None:
        share = 1.0 - group["dampening"]
        mixed = momentum * buffer + share * step
    if group["nesterov"]:
        return step + momentum * mixed, 1.0 + momentum * share
    return mixed, share


DOUBLE_BACKWARD = "double-backward"
HYPERGRADIENTS = ("jvp", "finite-difference", DOUBLE_BACKWARD)


@dataclass(frozen=True)
class MetaStepOptions:
    """`MetaIADA` has what each means and costs."""

    hypergradient: str = "jvp"
    scope: Scope = "full"
    interval: int = 1
    low_memory: bool = False
    virtual: VirtualStep = VirtualStep()

    def __post_init__(self) -> None:
        check_choice("hypergradient", self.hypergradient, HYPERGRADIENTS)
        check_scope(self.scope)
        check_count("interval", self.interval, remedy="1 is every iteration")

    @property
    def moves_backbone(self) -> bool:
        """Whether the virtual step moves more than the head."""
        return self.scope != "head"

    def refuse_double_backward(self, allowed: str, remedy: str) -> None:
        """Raises ValueError for double backward, which does without what the other two can have."""
        if self.hypergradient == DOUBLE_BACKWARD:
            expected = f"'jvp' or 'finite-difference' {allowed}"
            raise argument_error("hypergradient", expected, repr(DOUBLE_BACKWARD), remedy)
