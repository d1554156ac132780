"""Notices numbers that are not finite, and says where and what to try."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CHECK_EVERY = 32  # steps between two looks at an accelerator's losses


class LossWatch:
    """Raises FloatingPointError at a loss that is not finite, without waiting for the device.

    On a CPU each loss is read at once. Elsewhere every 32 steps a copy of the losses since the
    last look sets out to pinned memory, and is read when it has arrived.

    losses: of one epoch, (steps), written by the caller.  first_step: of the epoch, in the run.
    """

    def __init__(self, losses: Tensor, epoch: int, first_step: int) -> None:
        self.losses, self.epoch, self.first_step = losses, epoch, first_step
        self.seen = 0
        self._copy: tuple[Tensor, Any] | None = None

    def look(self, done: int) -> None:
        """Called when the first `done` losses of the epoch have been written."""
        if self.losses.device.type == "cpu":
            self.finish(done)
            return
        if self._copy is not None and self._copy[1].query():
            copy, _ = self._copy
            self._copy = None
            self._read(copy)
        if self._copy is None and done - self.seen >= CHECK_EVERY:
            part = self.losses[self.seen : done]
            copy = torch.empty_like(part, device="cpu", pin_memory=True)
            copy.copy_(part, non_blocking=True)
            arrived = torch.Event(self.losses.device)
            arrived.record()
            self._copy = copy, arrived

    def finish(self, done: int) -> None:
        """The same for all that was not read yet; waits for the device."""
        self._copy = None
        self._read(self.losses[self.seen : done].cpu())

    def _read(self, losses: Tensor) -> None:
        """Those from `seen` on."""
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            first = int(bad[0, 0])
            step = self.first_step + self.seen + first
            raise diverged(f"{float(losses[first])}", step, self.epoch)
        self.seen += len(losses)


def diverged(got: str, step: int, epoch: int) -> FloatingPointError:
    """The error that ends a run whose numbers are no longer finite."""
    return FloatingPointError(
        f"loss: expected a finite number, got {got} at step {step} (epoch {epoch}); try a smaller "
        "lr or alpha, alpha_ramp=true, warmup_epochs, or clip_norm (the last checkpoint is intact)"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; waits for the device once."""
    bad = [~torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()]
    return not bad or not bool(torch.stack(bad).any())
