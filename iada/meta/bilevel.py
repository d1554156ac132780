"""One iteration of a bilevel method: forward, a meta step where it is due, the optimizer's step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.feature_jvp import DIFFERENCES, GRAPH, FeatureJVP
from iada.meta.hypergradient import ForwardPass, MetaPasses
from iada.meta.learner import HeadGradients, ShardedBatch
from iada.meta.method import MetaStep, Method
from iada.meta.options import MetaStepOptions
from iada.meta.scope import moved_parameters


class BilevelMethod(Method):
    """A method with a network, or Σ, that learns from a meta set how to weigh the training loss.

    Subclasses give `observe`, `meta_step` and `training_gradients`.

    Args:
        options: how a meta step is computed.
        common: clip_norm, scaler and process_group of `Method`.
    """

    _meta_loss: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        options: MetaStepOptions,
        **common: Any,
    ) -> None:
        super().__init__(backbone, head, optimizer, **common)
        options.virtual.check(optimizer)
        self.options = options
        mode = GRAPH if options.hypergradient == "jvp" else DIFFERENCES
        self._feature_jvp = FeatureJVP(self._passes, mode)
        self._meta_passes = MetaPasses(self._learner, self._passes, self._feature_jvp, options)
        moved_parameters(backbone, head, self._learner.trained(), options.scope)  # or refused
        self._steps = 0
        dtype = torch.promote_types(torch.float32, head.weight.dtype)
        nan = torch.full((), torch.nan, dtype=dtype, device=head.weight.device)
        self.register_buffer("_meta_loss", nan)

    @property
    def needs_meta_batch(self) -> bool:
        """Whether the next `step` makes a meta step: with interval=k one in k does."""
        return self._steps % self.options.interval == 0

    def meta_steps(self, count: int) -> Sequence[bool]:
        """Which of the next `count` steps make a meta step."""
        interval = self.options.interval
        return [step % interval == 0 for step in range(self._steps, self._steps + count)]

    def step(self, batch: Sequence[Any], meta_batch: Sequence[Any] | None = None) -> MetaStep:
        """One iteration.

        Args:
            batch: (inputs, labels) or (inputs, labels, index), index (N) the samples' places in
                the training set.
            meta_batch: (inputs, labels), of any size; not looked at unless `needs_meta_batch`.
        """
        learner = self._learner
        rows = self._shard(batch)
        meta_rows = None
        if self.needs_meta_batch:
            meta_rows = learner.shard_batch("meta_batch", meta_batch, 0)
        with self._passes.own_autocast():
            random_state = self._passes.random_state()
            features = self._passes.forward_and_update_buffers(rows.inputs)
            forward = ForwardPass(rows, random_state, features, learner.gather(features, rows))
            observed = self.observe(forward)
            if meta_rows is not None:
                features, observed = self.meta_step(forward, observed, meta_rows)
                forward = replace(forward, features=features)
            loss, gradients, epsilon = self.training_gradients(
                forward, observed, after_meta_step=meta_rows is not None
            )
            learner.apply_gradients(forward.features, gradients, rows, self.clip_norm)
        self._steps += 1
        return MetaStep(loss, self._meta_loss, epsilon)

    def observe(self, forward: ForwardPass) -> Any:
        """What the method's network sees of the batch, and takes in of it."""
        raise NotImplementedError

    def meta_step(
        self, forward: ForwardPass, observed: Any, meta_rows: ShardedBatch
    ) -> tuple[Tensor, Any]:
        """Learn from the meta batch.

        Returns this process's features, with the graph to go on with, and what `observe` gave,
        as it is now.
        """
        raise NotImplementedError

    def training_gradients(
        self, forward: ForwardPass, observed: Any, after_meta_step: bool
    ) -> tuple[Tensor, HeadGradients, Tensor | None]:
        """The training loss (), its gradients by features and head, and ε (N) if there is one."""
        raise NotImplementedError

    def get_extra_state(self) -> dict[str, Any]:
        """Where the iterations stand, and how ḣ is computed on this backbone."""
        return {
            "steps": self._steps,
            "jvp_mode": self._feature_jvp.mode,
            "math_attention": self._passes.math_attention,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self._steps = state["steps"]
        self._feature_jvp.mode = state["jvp_mode"]
        self._passes.math_attention = state["math_attention"]
