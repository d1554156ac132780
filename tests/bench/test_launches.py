"""A recorded launch alone gives what it gave in its step."""

import pytest
import torch

pytest.importorskip("triton")

from bench.offline.launches import relaunch
from iada_kernels.contract import ClassStatistics, LossNeeds
from iada_kernels.dispatch import select_backend
from iada_kernels.triton import config
from iada_kernels.triton.launch import INTERPRETED, recording
from tests.helpers.interpreter import GENERAL
from tests.helpers.problems import random_problem

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts what interpreted kernels do")


def test_the_last_program_sums_in_a_launch_alone_too():
    problem = random_problem(40, 18, 34, structure="full", dtype=torch.float32, margin=0.0)
    inputs, options = problem.records()
    stream = ClassStatistics(torch.zeros(18, 34), torch.zeros(18, dtype=torch.int64))
    backend, needs = select_backend("triton", torch.device("cpu")), LossNeeds(*[True] * 6)
    with config.use(GENERAL), recording() as launches:
        loss, saved = backend.loss_forward(inputs, options, needs, stream)
        backend.loss_backward(inputs, options, saved, torch.ones_like(loss), needs)
    logits = next(
        launch
        for launch in launches
        if launch.kernel.fn.__name__ == "logits_kernel" and "reduction.loss" in launch.leaves()
    )
    for _ in range(2):
        loss.fill_(torch.nan)
        relaunch(logits)
        assert torch.isfinite(loss)
