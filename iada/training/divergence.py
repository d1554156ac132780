"""Notices losses that are not finite or explode, and says where and what to try."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FINITE = "a finite number"
CHECK_EVERY = 32  # steps between two looks at an accelerator's losses


class LossWatch:
    """Raises FloatingPointError at a loss that is not finite or explodes, without waiting.

    On a CPU each loss is read at once. Elsewhere every 32 steps a copy of the losses since the
    last look sets out to pinned memory, and is read when it has arrived.

    losses, meta_losses: of one epoch, (steps) each, written by the caller.  first_step: of the
    epoch, in the run.  limit: either may be so many times the larger of `start` and `least`; 0 for
    no limit.  start: the first loss of this phase of the run, None before it, and then kept here.
    meta_from: the step of the epoch from which on there is a meta loss; None for not yet, until
    `expect_meta_losses`. What `meta_losses` holds of the steps before is not looked at.
    """

    def __init__(
        self,
        losses: Tensor,
        meta_losses: Tensor,
        epoch: int,
        first_step: int,
        limit: float = 0.0,
        least: float = 1.0,
        start: float | None = None,
        meta_from: int | None = 0,
    ) -> None:
        self.losses, self.meta_losses = losses, meta_losses
        self.epoch, self.first_step = epoch, first_step
        self.limit, self.least, self.start = limit, least, start
        self.meta_from = meta_from
        self.seen = 0
        self._copy: tuple[Tensor, Any] | None = None

    def expect_meta_losses(self, place: int) -> None:
        """Step `place` of the epoch makes a meta step: from it on, each step has a meta loss."""
        if self.meta_from is None:
            self.meta_from = place

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
            part = self._part(done)
            copy = torch.empty_like(part, device="cpu", pin_memory=True)
            copy.copy_(part, non_blocking=True)
            arrived = torch.Event(self.losses.device)
            arrived.record()
            self._copy = copy, arrived

    def finish(self, done: int) -> None:
        """The same for all that was not read yet; waits for the device."""
        self._copy = None
        self._read(self._part(done).cpu())

    def _part(self, done: int) -> Tensor:
        """Both losses of the steps that were not read yet, (2, steps)."""
        return torch.stack([self.losses[self.seen : done], self.meta_losses[self.seen : done]])

    def _read(self, losses: Tensor) -> None:
        """Those from `seen` on."""
        for loss, meta_loss in losses.T.tolist():
            step = self.first_step + self.seen
            if not math.isfinite(loss):
                raise diverged("loss", FINITE, f"{loss}", step, self.epoch)
            named = [("loss", loss)]
            if self.meta_from is not None and self.seen >= self.meta_from:
                if not math.isfinite(meta_loss):
                    raise diverged("meta loss", FINITE, f"{meta_loss}", step, self.epoch)
                named.append(("meta loss", meta_loss))
            if self.start is None:
                self.start = loss
            bound = self.limit * max(self.start, self.least)
            for name, value in named:
                if 0 < bound < value:
                    expected = f"at most {bound:.3g}, loss_limit={self.limit:g} times its start"
                    raise diverged(name, expected, f"{value:.3g}", step, self.epoch)
            self.seen += 1


def diverged(name: str, expected: str, got: str, step: int, epoch: int) -> FloatingPointError:
    """The error that ends a run which has diverged."""
    return FloatingPointError(
        f"{name}: expected {expected}, got {got} at step {step} (epoch {epoch}); try a smaller lr "
        "or alpha, clip_norm, alpha_ramp=true or warmup_epochs (the last checkpoint is intact)"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; waits for the device once."""
    bad = [~torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()]
    return not bad or not bool(torch.stack(bad).any())
