"""What an iteration with a meta set tells of itself."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MetaStep:
    """What one iteration did, as detached tensors: reading one waits for its device.

    loss: Eq. 10's loss before its step, (). meta_loss: CE at φ̄, (), of the last meta step where
    this iteration had none. epsilon: the strengths of Eq. 10, (N); None without a perturbation. All
    of the whole batch where processes share it.
    """

    loss: Tensor
    meta_loss: Tensor
    epsilon: Tensor | None
