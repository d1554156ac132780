"""Rules for what GPUs put into a graph where a CPU has another operator, by stand-ins of its nodes.

That they have these names and keep these tensors is asked of torch itself.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from iada.meta.graph_jvp import RULES


def drawn(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def stand_in(name, **saved):
    """A node that keeps these tensors, all of which torch's own has."""
    node = getattr(torch._C._functions, name)
    assert all(hasattr(node, f"_saved_{key}") for key in saved)
    return SimpleNamespace(**{f"_saved_{key}": value for key, value in saved.items()})


def assert_rule(name, node, function, inputs, directions):
    """For each subset of the inputs that move."""
    for moving in range(1, 2 ** len(inputs)):
        given = [d if moving >> place & 1 else None for place, d in enumerate(directions)]
        full = tuple(
            torch.zeros_like(x) if d is None else d for x, d in zip(inputs, given, strict=True)
        )
        _, want = torch.func.jvp(function, tuple(inputs), full)
        torch.testing.assert_close(RULES[name](node, given), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", ["Cudnn", "Miopen"])
def test_batch_norm(library):
    inputs = drawn((6, 3, 4, 5), 3, 3)
    eps = 1e-3
    variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
    node = stand_in(
        f"{library}BatchNormBackward0",
        input=inputs[0],
        weight=inputs[1],
        training=True,
        epsilon=eps,
        result1=mean,
        result2=(variance + eps).rsqrt(),
    )

    def batch_norm(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    assert_rule(f"{library}BatchNormBackward0", node, batch_norm, inputs, drawn((6, 3, 4, 5), 3, 3))


@pytest.mark.parametrize("shape", [(7,), (5, 7)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm(shape, has_weight):
    x, weight = drawn((4, 5, 7), shape)
    axes = tuple(range(-len(shape), 0))
    node = stand_in(
        "FusedRmsNormBackward0",
        input=x,
        weight=weight if has_weight else None,
        normalized_shape=shape,
        result1=(x.square().mean(dim=axes, keepdim=True) + 1e-3).rsqrt(),
    )
    directions = drawn((4, 5, 7), shape)
    if has_weight:
        inputs, function = [x, weight], lambda x, weight: F.rms_norm(x, shape, weight, 1e-3)
        assert_rule("FusedRmsNormBackward0", node, function, inputs, directions)
    else:
        _, want = torch.func.jvp(lambda x: F.rms_norm(x, shape, None, 1e-3), (x,), (directions[0],))
        found = RULES["FusedRmsNormBackward0"](node, [directions[0], None])
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
