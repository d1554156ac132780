"""What makes a run faster without changing what it computes: autocast, channels-last, compilation.

Each is an option of `TrainerConfig`. Parameters, covariances and the loss stay in float32.
"""

import contextlib
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from iada.training.config import TrainerConfig
from iada.utils.checks import argument_error
from iada.utils.loading import to_device


class SingleGraph(nn.Module):
    """torch.compile takes a bare nn.Sequential layer by layer, and this in one graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Any) -> Tensor:
        """What `inner` gives."""
        return self.inner(inputs)


class Acceleration:
    """The options of a run, applied to its backbone, batches and passes.

    float16 is not offered: its narrow range needs a scaled loss in every method.
    """

    def __init__(self, config: TrainerConfig, device: torch.device) -> None:
        self.dtype = None if config.autocast == "none" else getattr(torch, config.autocast)
        self.channels_last, self.compile = config.channels_last, config.compile
        self.device = device
        if self.dtype is not None and not torch.amp.is_autocast_available(device.type):
            got = f"{config.autocast!r} on {device.type}"
            raise argument_error("autocast", "a device that has it", got, "pass 'none'")

    def prepare(self, backbone: nn.Module) -> nn.Module:
        """The backbone as the method is to run it, with the same parameters."""
        if self.channels_last:
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not self.compile:
            return backbone
        # Meta-IADA goes down a pass's graph twice, which donated buffers do not allow.
        functorch_config.donated_buffer = False
        return torch.compile(SingleGraph(backbone), dynamic=False)  # type: ignore[return-value]

    def placed(self, batch: Any) -> tuple[Any, ...]:
        """A batch on the device, its images, (N, C, H, W), as the backbone has its weights."""
        inputs, *rest = to_device(tuple(batch), self.device)
        if self.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        return inputs, *rest

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For everything that runs the backbone."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)
