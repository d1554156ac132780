"""The times that `make regression` compares with those it stored before on the same machine."""

import pytest
import torch
import torch.nn.functional as F

import iada
from bench.measuring.shapes import SHAPES, make_problem
from iada_kernels import native

SPEEDS = ("cifar10-r32", "cifar100-r32", "cifar10-wrn", "civil-bert")


def eager(problem):
    return problem.gradients(iada.eager_loss)


def on_torch(problem):
    return problem.gradients(iada.fused_loss, backend="torch")


def on_native(problem):
    return problem.gradients(iada.fused_loss, backend="native")


def cross_entropy(problem):
    loss = F.cross_entropy(F.linear(problem.features, problem.weight, problem.bias), problem.labels)
    return torch.autograd.grad(loss, problem.differentiable[:3])


@pytest.mark.parametrize("side", [cross_entropy, on_native, on_torch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SPEEDS)
def test_speed(benchmark, name, side):
    if side is on_native and not native.is_available():
        pytest.skip("no native library here")
    benchmark.group = name
    benchmark(side, make_problem(SHAPES[name]))


def test_speed_of_the_eager_form(benchmark):
    benchmark(eager, make_problem(SHAPES["cifar10-r32"]))
