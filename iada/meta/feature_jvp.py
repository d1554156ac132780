"""ḣ = J v, how the features move with the parameters: by forward mode or finite differences."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.backbone_passes import BackbonePasses, RandomState
from iada.meta.graph_jvp import FUSED_ATTENTION, Opaque, graph_jvp, graph_order

log = logging.getLogger("iada")

GRAPH, DIFFERENCES = "graph", "finite-difference"

Directions = Mapping[Tensor, Tensor]


class FeatureJVP:
    """The features' Jacobian-vector product, by the best mode that the backbone allows.

    - "graph": read off the training pass's graph (`iada.meta.graph_jvp`): exact, without a further
      forward;
    - "finite-difference": two forwards, (h(φ + t v) − h(φ − t v)) / 2t.

    It goes from the first to the second, for good and with one line in the log "iada", where the
    backbone does not allow the first. Dual tensors would be a third way, with one forward, but
    they take derivatives through what runs under no_grad, which the backward pass does not:
    for a spectral norm they are wrong.
    """

    def __init__(self, passes: BackbonePasses, mode: str = GRAPH) -> None:
        self.passes, self.mode = passes, mode

    @torch.no_grad()
    def __call__(
        self, features: Tensor, inputs: Any, random_state: RandomState, directions: Directions
    ) -> Tensor | None:
        """ḣ (N, A), None if no feature depends on what moves.

        Args:
            features: of the training batch at φ, with their graph where the mode is "graph".
            inputs, random_state: what they were computed from.
            directions: v of each parameter that moves.
        """
        if features.dtype == torch.float16:  # tangents as small as η v would underflow
            size = _norm(directions.values()).clamp(min=torch.finfo(torch.float32).tiny)
            scaled = {parameter: v / size for parameter, v in directions.items()}
            tangent = self._tangent(features, inputs, random_state, scaled)
            return None if tangent is None else tangent.float() * size
        return self._tangent(features, inputs, random_state, directions)

    def _tangent(
        self, features: Tensor, inputs: Any, random_state: RandomState, directions: Directions
    ) -> Tensor | None:
        if self.mode == GRAPH:
            try:
                return graph_jvp(features, directions)
            except Opaque as reason:
                opaque = reason
            if opaque.node in FUSED_ATTENTION:  # a dropout mask that only the kernel knows
                self.passes.math_attention = True
                log.info("attention with dropout runs by its formula from the next step on")
                return self._by_differences(inputs, random_state, directions)
            self.mode = DIFFERENCES
            passes = self.passes
            layer = _layer_of(
                opaque.node, passes.backbone, lambda: passes.forward_replayed(inputs, random_state)
            )
            words = "hypergradient by finite differences, not exact: no forward-mode derivative in"
            log.warning("%s layer %s (%s)", words, layer, opaque)
        return self._by_differences(inputs, random_state, directions)

    def _by_differences(
        self, inputs: Any, random_state: RandomState, directions: Directions
    ) -> Tensor:
        """Central differences with a step of a small share of ‖φ‖ along v."""
        values = list(directions.values())
        dtype = torch.promote_types(torch.float32, values[0].dtype)
        share = torch.finfo(dtype).eps ** (1 / 3)
        size = _norm(values)
        tiny = torch.finfo(size.dtype).tiny
        size = torch.where(size > tiny, size, 1.0)  # of a rate of 0: any step is one of nothing
        step = share * _norm([p.detach() for p in directions]) / size
        named = {n: p for n, p in self.passes.backbone.named_parameters() if p in directions}
        ends = []
        for signed in (step, -step):
            moved = {n: p.detach() + (signed * directions[p]).to(p.dtype) for n, p in named.items()}
            ends.append(self.passes.forward_replayed(inputs, random_state, moved).to(dtype))
        return (ends[0] - ends[1]) / (2 * step)


def _norm(tensors: Any) -> Tensor:
    """The Euclidean norm of all numbers in `tensors`, (), float32 at least."""
    norms = torch.stack([torch.linalg.vector_norm(t.detach().float()) for t in tensors])
    return torch.linalg.vector_norm(norms)


def _layer_of(node: str, backbone: nn.Module, run: Callable[[], Tensor]) -> str:
    """The innermost module whose output has a node of that name behind it, as 'name' (class)."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else [output]
            tensors = [] if found else [part for part in outputs if isinstance(part, Tensor)]
            if any(behind.name() == node for part in tensors for behind, _ in graph_order(part)):
                found.append(f"{name!r} ({type(module).__name__})")

        return hook

    try:
        for name, module in backbone.named_modules():
            handles.append(module.register_forward_hook(watch(name)))
        with torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else f"'' ({type(backbone).__name__})"
