"""ε of each sample and its unit: by the network Ω, which learns (Eq. 8), or a constant."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iada.meta.hypergradient import ForwardPass
from iada.meta.learner import linear
from iada.nn.characteristics import PROPORTION, TrainingMemory, characteristics
from iada.nn.class_covariance import ClassCovariance
from iada.nn.perturbation_net import PerturbationNet
from iada.nn.precision import KeepsPrecision
from iada.utils.checks import argument_error, check_choice, check_number

EPSILON_UNITS = ("feature", "class-deviation")


@dataclass(frozen=True)
class EpsilonScale:
    """ε = factor · u_y · tanh(…), with u_y constant in every derivative.

    With |ε| = 1 a feature moves by √A in length, which is one to four times the root mean square
    radius √(tr Σ_y) of a class in ResNet-32s after 200 epochs on CIFAR-10, and four to eight times
    after 12. unit "class-deviation" is
    u_y = √(tr Σ_y / A), so that tanh = 1 moves it by one such radius; "feature" is u_y = 1.
    """

    factor: float = 1.0
    unit: str = "feature"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            remedy = "epsilon=0.0 is without a perturbation"
            raise argument_error("epsilon_scale", "a number above 0", repr(self.factor), remedy)
        check_choice("epsilon_unit", self.unit, EPSILON_UNITS)

    @torch.no_grad()
    def at(self, covariance: ClassCovariance, labels: Tensor) -> Tensor | float:
        """The scale of each sample, (N), or of all; labels (N)."""
        if self.unit == "feature":
            return self.factor
        return self.factor * covariance.variances.mean(dim=1).clamp(min=0).sqrt()[labels]


class Observed(NamedTuple):
    """What Eq. 6 takes beside features and head.

    characteristics: that Ω sees, (N, 15); (N, 0) for a constant ε. unit: of ε, (N) or a number,
    which no derivative passes through. sigma: Σ.
    """

    characteristics: Tensor
    unit: Tensor | float
    sigma: Tensor


class SampleEpsilon(KeepsPrecision):
    """ε = u tanh(…) by Ω, or u times a constant; 0 is None throughout, which spares kernels work.

    Args:
        perturbation: the network Ω; None for a new one.
        optimizer: of Ω's parameters; its state is in `state_dict`. None for Adam at 1e-3.
        value: a number in place of both, or None.
        scale: the unit u.
        log_prior: log π, (C).
        scaler: a GradScaler, enabled or not.
        log_proportion: Ω sees log π_y in the place of π_y.
    """

    perturbation: PerturbationNet | None

    def __init__(
        self,
        perturbation: PerturbationNet | None,
        optimizer: torch.optim.Optimizer | None,
        value: float | None,
        scale: EpsilonScale,
        log_prior: Tensor,
        scaler: torch.amp.GradScaler,
        log_proportion: bool = False,
    ) -> None:
        super().__init__()
        if value is None:
            if perturbation is None:
                perturbation = PerturbationNet(device=log_prior.device, dtype=log_prior.dtype)
            elif not isinstance(perturbation, nn.Module):
                expected, got = "a network, as iada.PerturbationNet", repr(perturbation)
                raise argument_error("perturbation", expected, got, "a number is epsilon")
            optimizer = optimizer or torch.optim.Adam(perturbation.parameters(), lr=1e-3)
        else:
            check_number("epsilon", value)
            given = {"perturbation": perturbation, "perturbation_optimizer": optimizer}
            for name, part in given.items():
                if part is not None:
                    expected, got = f"None with epsilon={value}", f"a {type(part).__name__}"
                    raise argument_error(name, expected, got, "leave one of them out")
        self.perturbation = perturbation
        self.value = float(value or 0.0)
        self.optimizer, self.scale, self.scaler = optimizer, scale, scaler
        self.log_proportion = log_proportion
        self.log_prior = nn.Buffer(log_prior, persistent=False)
        self.check_optimizer()

    def trained(self) -> list[Tensor]:
        """Ω's parameters that learn."""
        return [p for p in self.parameters() if p.requires_grad]

    def check_optimizer(self) -> None:
        """ValueError if it would leave some of `trained` as they are."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        moved = {id(p) for group in groups for p in group["params"]}
        if any(id(p) not in moved for p in self.trained()):
            expected = "an optimizer of all of Ω's parameters that ask for a gradient"
            remedy = (
                "build it from perturbation.parameters(), and call load_state_dict without "
                "assign=True, which puts others in their place"
            )
            raise argument_error("perturbation_optimizer", expected, "one of others", remedy)

    @torch.no_grad()
    def observe(
        self,
        forward: ForwardPass,
        head: nn.Linear,
        memory: TrainingMemory,
        covariance: ClassCovariance,
    ) -> Observed:
        """The characteristics f of the whole batch, which the memory takes in, and ε's unit."""
        features, rows = forward.global_features, forward.rows
        sigma = covariance.shrunk()
        unit = self.scale.at(covariance, rows.labels)
        if self.perturbation is None:
            return Observed(features[:, :0], unit, sigma)
        logits = linear(features, head.weight, head.bias)
        values = characteristics(
            features, logits, rows.labels, head.weight, self.log_prior, memory, rows.index
        )
        memory.record(values[:, 0], values[:, 1], rows.labels, rows.index)
        if self.log_proportion:
            values[:, PROPORTION] = self.log_prior[rows.labels].to(values.dtype)
        return Observed(values, unit, sigma)

    def differentiable(self, observed: Observed) -> Tensor | None:
        """ε (N), with its graph; moves the running statistics of Ω's BatchNorm."""
        if self.perturbation is None:
            return self.values(observed)
        with torch.enable_grad():
            return _in_units(self.perturbation(observed.characteristics), observed.unit)

    @torch.no_grad()
    def values(self, observed: Observed, moves_buffers: bool = True) -> Tensor | None:
        """ε (N); the running statistics of Ω's BatchNorm move once an iteration."""
        values = observed.characteristics
        if self.perturbation is None:
            if not self.value:
                return None
            return _in_units(values.new_full((len(values),), self.value), observed.unit)
        if moves_buffers:
            return _in_units(self.perturbation(values), observed.unit)
        buffers = {name: buffer.clone() for name, buffer in self.perturbation.named_buffers()}
        return _in_units(functional_call(self.perturbation, buffers, (values,)), observed.unit)

    def learn(self, epsilon: Tensor | None, grad: Tensor | None, scale: Any) -> None:
        """Eq. 8, from ε with its graph and the meta loss's gradient by it, (N)."""
        trained = self.trained()
        if trained:
            assert epsilon is not None
            assert grad is not None
            self.step(torch.autograd.grad(epsilon, trained, grad.to(epsilon.dtype)), scale)

    def step(self, grads: Sequence[Tensor], scale: Any) -> None:
        """Eq. 8, from the gradients by `trained`; scale: the scaler's factor."""
        if grads and self.optimizer is not None:
            for parameter, grad in zip(self.trained(), grads, strict=True):
                parameter.grad = grad * scale
            self.scaler.step(self.optimizer)

    def get_extra_state(self) -> dict[str, Any]:
        """The state of Ω's optimizer."""
        return {} if self.optimizer is None else self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)


def _in_units(epsilon: Tensor, unit: Tensor | float) -> Tensor:
    return epsilon if isinstance(unit, float) and unit == 1.0 else epsilon * unit
