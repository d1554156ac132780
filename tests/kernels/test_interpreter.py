"""What the suite changes of Triton's interpreter to be quick changes no result."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from iada_kernels.contract import LossNeeds
from iada_kernels.dispatch import select_backend
from iada_kernels.triton import config
from iada_kernels.triton.launch import INTERPRETED
from tests.helpers.interpreter import GENERAL
from tests.helpers.problems import random_problem

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


def step():
    problem = random_problem(9, 3, 17, structure="full", dtype=torch.float32)
    inputs, options = problem.records()
    passes, needs = select_backend("triton", torch.device("cpu")), LossNeeds(*[True] * 6)
    loss, saved = passes.loss_forward(inputs, options, needs)
    return [loss, *passes.loss_backward(inputs, options, saved, loss, needs).tensors()]


@pytest.mark.parametrize("kernels", [config.INTERPRETER, GENERAL], ids=["single", "general"])
def test_the_same_bits(monkeypatch, kernels):
    calls = []
    slow = interpreter._patch_lang.__wrapped__  # the suite's own is around it
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: calls.append(fn) or slow(fn))
    with config.use(kernels):
        want = step()
        monkeypatch.undo()
        for have, expected in zip(step(), want, strict=True):
            assert torch.equal(have, expected)
    assert len(calls) > 20


def test_after_a_launch_the_language_is_triton_s():
    step()
    assert tl.core.is_builtin(tl.load)
    assert tl.core.is_builtin(tl.tensor.to)
