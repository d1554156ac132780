"""The Jacobian-vector product of an output along parameters, read off its retained graph.

Autograd has kept, for the backward pass, what every operator needs for its derivative. The same
is all that the forward-mode derivative needs: walking the graph from the parameters to the output
gives ẏ = J v without computing the output again, with the dropout masks, the batch statistics and
the casts of the pass that made it, and without touching buffers or random state.

Operators that take most of the time have a rule. For any other one the tangent comes from its own
backward function, which is linear in the gradient it is given: differentiating it by that gradient
transposes it. That holds for autograd Functions written in Python too, unless they are marked as
once differentiable; these, compiled modules and reentrant checkpoints are `Opaque`.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

Tangents = list[Tensor | None]


class Opaque(Exception):
    """An operator of the graph whose forward-mode derivative cannot be had from it.

    node: the operator's name in the graph, e.g. "EmbeddingBagBackward0".
    """

    def __init__(self, node: Any, why: str) -> None:
        super().__init__(f"{node.name()}: {why}")
        self.node = node.name()


Edges = list[tuple[Any, int]]


def graph_order(output: Tensor) -> list[tuple[Any, Edges]]:
    """The nodes behind `output`, each after those it reads from, with (node, output) of these."""
    order: list[tuple[Any, Edges]] = []
    if output.grad_fn is None:
        return order
    done: set[Any] = set()
    stack: list[tuple[Any, Edges | None]] = [(output.grad_fn, None)]
    while stack:
        node, edges = stack.pop()
        if edges is not None:
            order.append((node, edges))
        elif node not in done:
            done.add(node)
            edges = list(node.next_functions)
            stack.append((node, edges))
            stack += [(reads, None) for reads, _ in edges if reads is not None]
    return order


@torch.no_grad()
def graph_jvp(output: Tensor, directions: Mapping[Tensor, Tensor]) -> Tensor | None:
    """ẏ (like `output`) for parameters that move along `directions`; None if it does not depend.

    Call it before the graph is freed. Raises `Opaque` where the graph does not say.
    """
    order = graph_order(output)
    if not order:
        return None
    users = collections.Counter(reads for _, edges in order for reads, _ in edges)
    # The tangents of what each node made, in the order of its outputs, while somebody waits.
    made: dict[Any, Tangents] = {None: []}
    for node, edges in order:
        if hasattr(node, "variable"):  # a leaf
            made[node] = [directions.get(node.variable)]
            continue
        given = [made[reads][place] if place < len(made[reads]) else None for reads, place in edges]
        made[node] = [] if all(t is None for t in given) else _advance(node, given)
        del given
        for reads, _ in edges:
            users[reads] -= 1
            if reads is not None and not users[reads]:
                del made[reads]
    tangents = made[output.grad_fn]
    return tangents[output.output_nr] if output.output_nr < len(tangents) else None


def _advance(node: Any, given: Tangents) -> Tangents:
    """The tangents of a node's outputs from those of its inputs, of which one at least moves."""
    if node.name() in FLAT:
        return []
    rule = RULES.get(node.name())
    try:
        tangent = None if rule is None else rule(node, given)
        return _transposed(node, given) if tangent is None else [tangent]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise Opaque(node, str(error).partition("\n")[0]) from error


def _transposed(node: Any, given: Tangents) -> Tangents:
    """Any node: its backward function is v ↦ Jᵀv, linear, and differentiating it gives t ↦ J t."""
    with torch.enable_grad():
        probes = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device, requires_grad=True)
            for meta in node._input_metadata
        ]
        if node.name() == "CheckpointFunctionBackward":  # its backward changes .grad
            raise RuntimeError("reentrant checkpoint")
        if isinstance(node, BackwardCFunction):
            found, given = _of_tensors(node, node.apply(*probes), given)
        else:
            found = node(*probes)
            found = list(found) if isinstance(found, tuple) else [found]
        # The engine sums a broadcast input's gradient and casts it afterwards: here it is neither.
        pairs = [
            (grad, tangent.to(grad.dtype).expand(grad.shape))
            for grad, tangent in zip(found, given, strict=True)
            if grad is not None and tangent is not None
        ]
        if not pairs:
            return []
        grads, tangents = zip(*pairs, strict=True)
        moved: Tangents = list(torch.autograd.grad(grads, probes, tangents, allow_unused=True))
        if all(tangent is None for tangent in moved):
            raise RuntimeError("its backward function has no derivative")
        return moved


def _of_tensors(node: Any, found: Any, given: Tangents) -> tuple[list[Any], Tangents]:
    """A Python Function gives a gradient for each argument, but its edges are the tensors alone."""
    found = found if isinstance(found, tuple) else (found,)
    moving = [t for t, (reads, _) in zip(given, node.next_functions, strict=True) if reads]
    return [g for g, asked in zip(found, node.needs_input_grad, strict=False) if asked], moving


# Rules: (node, tangents of its inputs) → tangent of its only output that carries one, or None to
# leave the case to `_transposed`.


def _convolution(node: Any, given: Tangents) -> Tensor | None:
    moved_input, moved_weight, moved_bias = given
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    settings = [getattr(node, f"_saved_{name}") for name in names]

    def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(inputs, weight, bias, *settings)

    if moved_weight is None and moved_bias is not None:
        return None
    tangent = None
    if moved_weight is not None:
        tangent = convolve(node._saved_input, moved_weight, moved_bias)
    if moved_input is not None:
        tangent = _plus(tangent, convolve(moved_input, node._saved_weight, None))
    return tangent


def _batch_norm(node: Any, given: Tangents) -> Tensor | None:
    """γ x̂̇ + γ̇ x̂ + β̇; the Jacobian of x ↦ γ x̂ is symmetric, so its backward kernel serves.

    torch's own does for the statistics of cuDNN and MIOpen too, which are mean and 1/√(var + eps).
    """
    moved_input, moved_weight, moved_bias = given
    inputs, weight = node._saved_input, node._saved_weight
    if not node._saved_training or weight is None:
        return None
    mean, inverse_deviation = node._saved_result1, node._saved_result2
    tangent = None
    if moved_input is not None:
        eps = node._saved_epsilon if hasattr(node, "_saved_epsilon") else node._saved_eps
        saved = (inputs, weight, None, None, mean, inverse_deviation, True, eps)
        backward = torch.ops.aten.native_batch_norm_backward
        tangent = backward(moved_input, *saved, [True, False, False])[0]
    if moved_weight is None and moved_bias is None:
        return tangent
    slope = torch.zeros_like(weight) if moved_weight is None else moved_weight * inverse_deviation
    shift = -slope * mean
    if moved_bias is not None:
        shift += moved_bias
    shape = (-1, *[1] * (inputs.dim() - 2))
    slope, shift = (t.to(inputs.dtype).view(shape) for t in (slope, shift))
    if tangent is None:
        return torch.addcmul(shift, inputs, slope)
    return tangent.addcmul_(inputs, slope).add_(shift)


def _add(node: Any, given: Tangents) -> Tensor | None:
    first, second = given
    shape = node._input_metadata[0].shape
    if second is None:
        assert first is not None
        return first.expand(shape)
    if first is None:
        return (second * node._saved_alpha).expand(shape)
    return torch.add(first, second, alpha=node._saved_alpha)


def _addmm(node: Any, given: Tangents) -> Tensor | None:
    """β M + α A B."""
    moved, moved_left, moved_right = given
    if node._saved_beta != 1 or node._saved_alpha != 1:
        return None
    tangent = _product(node._saved_mat1, node._saved_mat2, moved_left, moved_right)
    return tangent if moved is None else _plus(tangent, moved.expand(node._input_metadata[0].shape))


def _matmul(saved_left: str, saved_right: str) -> Callable[[Any, Tangents], Tensor | None]:
    def rule(node: Any, given: Tangents) -> Tensor | None:
        left = getattr(node, saved_left) if given[1] is not None else None
        right = getattr(node, saved_right) if given[0] is not None else None
        return _product(left, right, *given)

    return rule


def _product(
    left: Tensor | None, right: Tensor | None, moved_left: Tensor | None, moved_right: Tensor | None
) -> Tensor | None:
    """(A B)˙; a factor may be missing where the other one does not move."""
    tangent = None
    if moved_left is not None:
        assert right is not None
        tangent = moved_left @ right
    if moved_right is not None:
        assert left is not None
        tangent = _plus(tangent, left @ moved_right)
    return tangent


def _plus(tangent: Tensor | None, part: Tensor) -> Tensor:
    """Their sum, in place of the first."""
    return part if tangent is None else tangent.add_(part)


def _layer_norm(node: Any, given: Tangents) -> Tensor | None:
    """As `_batch_norm`, each row by itself; γ is not constant over a row, and comes after."""
    moved_input, moved_weight, moved_bias = given
    inputs, weight = node._saved_input, node._saved_weight
    if weight is None or weight.dtype != inputs.dtype:
        return None
    mean, inverse_deviation = node._saved_result1, node._saved_result2
    tangent = None
    if moved_input is not None:
        saved = (inputs, node._saved_normalized_shape, mean, inverse_deviation, None, None)
        backward = torch.ops.aten.native_layer_norm_backward
        tangent = backward(moved_input, *saved, [True, False, False])[0].mul_(weight)
    if moved_weight is not None:
        part = (inputs - mean).mul_(inverse_deviation).mul_(moved_weight)
        tangent = _plus(tangent, part)
    return tangent if moved_bias is None else _plus(tangent, moved_bias.expand(inputs.shape))


def _rms_norm(node: Any, given: Tangents) -> Tensor | None:
    """γ x̂̇ + γ̇ x̂ of CUDA's fused kernel, whose backward has no derivative; x̂ = x / r."""
    moved_input, moved_weight = given
    inputs, weight, inverse = node._saved_input, node._saved_weight, node._saved_result1
    normalized = (inputs * inverse).to(inputs.dtype)
    tangent = None
    if moved_input is not None:
        axes = [-1 - axis for axis in range(len(node._saved_normalized_shape))]
        moved = (moved_input * inverse).to(inputs.dtype)
        tangent = moved - normalized * (normalized * moved).mean(dim=axes, keepdim=True)
        tangent = tangent if weight is None else tangent.mul_(weight)
    return tangent if moved_weight is None else _plus(tangent, normalized * moved_weight)


def _shaped(node: Any, given: Tangents) -> Tensor | None:
    assert given[0] is not None
    return given[0].reshape(node._input_metadata[0].shape)


def _cast(node: Any, given: Tangents) -> Tensor | None:
    assert given[0] is not None
    meta = node._input_metadata[0]
    return given[0].to(meta.device, meta.dtype)


def _attention(node: Any, given: Tangents) -> Tensor | None:
    """Fused attention has no second derivative of its own: that of the formula serves."""
    if getattr(node, "_saved_dropout_p", 0.0):
        raise RuntimeError("its dropout mask is inside a fused kernel")
    moved_bias = given[3] if len(given) > 3 else None
    bias = getattr(node, "_saved_attn_mask", None)
    bias = getattr(node, "_saved_attn_bias", None) if bias is None else bias
    tensors = [node._saved_query, node._saved_key, node._saved_value]
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        query, key, value = (
            tensor.detach() if moved is None else forward_ad.make_dual(tensor.detach(), moved)
            for tensor, moved in zip(tensors, given[:3], strict=True)
        )
        if bias is not None and moved_bias is not None:
            bias = forward_ad.make_dual(bias.detach(), moved_bias)
        settings = {"is_causal": node._saved_is_causal, "scale": node._saved_scale}
        result = F.scaled_dot_product_attention(query, key, value, bias, **settings)
        return forward_ad.unpack_dual(result).tangent


BATCH_NORMS = [f"{name}BatchNormBackward0" for name in ["Native", "Cudnn", "Miopen"]]
FLAT = [f"{name}Backward0" for name in ["Ceil", "Floor", "Round", "Sgn", "Sign", "Trunc"]]
SMOOTH = ["Elu", "Exp", "Gelu", "Mish", "Sigmoid", "Silu", "Softmax", "Softplus", "Tanh"]
PIECEWISE = ["Hardswish", "Hardtanh", "LeakyRelu", "NativeDropout"]

RULES: Mapping[str, Callable[[Any, Tangents], Tensor | None]] = {
    "ConvolutionBackward0": _convolution,
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "ReluBackward0": lambda node, given: torch.ops.aten.threshold_backward(
        given[0], node._saved_result, 0
    ),
    "AddBackward0": _add,
    "AddmmBackward0": _addmm,
    "MmBackward0": _matmul("_saved_self", "_saved_mat2"),
    "BmmBackward0": _matmul("_saved_self", "_saved_mat2"),
    "TBackward0": lambda node, given: given[0].t(),  # type: ignore[union-attr]
    "ViewBackward0": _shaped,
    "UnsafeViewBackward0": _shaped,
    "ReshapeAliasBackward0": _shaped,
    "ToCopyBackward0": _cast,
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
    # Functions of each number by itself, and softmax: J is symmetric, the backward function J.
    **{f"{name}Backward0": lambda node, given: node(given[0]) for name in SMOOTH + PIECEWISE},
}

FUSED_ATTENTION: Sequence[str] = [name for name in RULES if name.startswith("ScaledDotProduct")]
