"""A step without a meta set: one pass through the backbone, one through the head, and down."""

from collections.abc import Callable

from torch import Tensor

from iada.meta.backbone_passes import Passes
from iada.meta.learner import Learner, Rows


def plain_step(
    learner: Learner,
    passes: Passes,
    rows: Rows,
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    clip_norm: float,
) -> Tensor:
    """One step of the optimizer on a loss of the whole batch's features, weight and bias.

    The loss, detached. clip_norm: largest norm of the gradient, 0 for no clipping.
    """
    with passes.own_autocast():
        features = passes.first(rows.inputs)
        value, grads = learner.head_gradients(loss, learner.gather(features, rows))
        learner.descend(features, grads, rows, clip_norm)
    return value
