"""Passes of a backbone within one iteration: with which parameters, buffers and random state."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from iada.utils.autocast import full_precision


@dataclass(frozen=True)
class RandomState:
    """Of torch on the CPU and a device, of Python and of numpy, for a pass that draws the same."""

    cpu: Tensor
    python: Any
    numpy: Any
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device, with_numpy: bool = True) -> "RandomState":
        """The state at this moment; numpy's takes 60 µs."""
        on_device = None
        if device.type != "cpu":
            on_device = torch.get_device_module(device).get_rng_state(device)
        numpy = np.random.get_state() if with_numpy else None  # noqa: NPY002
        return cls(torch.get_rng_state(), random.getstate(), numpy, device, on_device)

    def restore(self) -> None:
        """Go on from this state."""
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        if self.numpy is not None:
            np.random.set_state(self.numpy)  # noqa: NPY002
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """This state while inside; afterwards what was before."""
        before = RandomState.now(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()


class BackbonePasses:
    """Runs the backbone, all three kinds of passes in the autocast mode that `step` was called in.

    Attributes:
        math_attention: attention by its formula instead of a fused kernel, which has no second
            derivative and keeps its dropout mask to itself.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        self.backbone, self.head = backbone, head
        self.math_attention = False
        self._autocast: tuple[bool, torch.dtype] = (False, torch.float32)

    @property
    def device(self) -> torch.device:
        """Of the classifier as it lies now: it may have been moved since it was given."""
        return self.head.weight.device

    def random_state(self) -> RandomState:
        """At this moment; of numpy where there are layers that may draw from it."""
        layered = next(self.backbone.parameters(), None) is not None
        return RandomState.now(self.device, with_numpy=layered)

    @contextlib.contextmanager
    def own_autocast(self) -> Iterator[None]:
        """While inside, autocast is as on entry in the passes alone, and graphs are kept."""
        kind = self.device.type
        self._autocast = (False, torch.float32)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            self._autocast = (True, torch.get_autocast_dtype(kind))
        with full_precision(self.device), torch.enable_grad():
            yield

    def forward_and_update_buffers(self, inputs: Any) -> Tensor:
        """The one pass that moves the backbone's buffers: BatchNorm's running statistics."""
        with self._modes():
            return self.backbone(inputs)

    def forward_frozen(self, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """With copies of the buffers, and with these parameters; random state moves on."""
        buffers = {name: buffer.clone() for name, buffer in self.backbone.named_buffers()}
        with self._modes():
            return functional_call(self.backbone, {**buffers, **(parameters or {})}, (inputs,))

    def forward_replayed(
        self, inputs: Any, random_state: RandomState, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """As `forward_frozen`, with the draws of the pass that started from `random_state`."""
        with random_state.replayed():
            return self.forward_frozen(inputs, parameters)

    @staticmethod
    @contextlib.contextmanager
    def substituted(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """While inside, parameters have other values, without a trace in any graph.

        Unlike the parameters of a functional call these stay for the backward pass, in which
        checkpointed layers run their forward again.
        """
        before = {parameter: parameter.data for parameter in values}
        try:
            for parameter, value in values.items():
                parameter.data = value
            yield
        finally:
            for parameter, data in before.items():
                parameter.data = data

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        enabled, dtype = self._autocast
        with contextlib.ExitStack() as stack:
            if enabled:  # no cache: it would hand one pass's casts to the next
                kind = self.device.type
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            if self.math_attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
