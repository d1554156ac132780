"""The roofline model: its bytes are those that kernels move, its occupancy what binaries allow."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted on CPUs only", allow_module_level=True)

from bench.measuring.shapes import SHAPES
from bench.offline.compiler import Usage
from bench.offline.launches import recorded
from bench.offline.work import Work, work_of
from bench.roofline import H200, predict, resident, tasks_of, waits
from iada_kernels.contract import ClassStatistics, LossNeeds
from iada_kernels.dispatch import select_backend
from iada_kernels.triton import config
from iada_kernels.triton.launch import recording
from tests.helpers.problems import random_problem
from tests.helpers.sanitizer import watching
from tests.kernels.test_triton_memory import EXCUSED

USED = Usage(registers=100, stack=0, spilled=0, scalar_spills=0, shared=4096)
N, C, A = 24, 4, 34
NEEDS = LossNeeds(True, True, True, False, True, False)


def moved_and_modelled(structure: str, absent: bool) -> list[tuple[str, int, float]]:
    """Of each launch of a step: the bytes that its programs touch, and those of the model."""
    problem = random_problem(
        N, C, A, structure=structure, dtype=torch.float32, margin=0.0, ignored=0.0
    )
    problem.labels[:C] = torch.arange(C)
    if absent:
        problem.labels[problem.labels == 3] = 1
    inputs, options = problem.records()
    backend = select_backend("triton", torch.device("cpu"))
    stream = ClassStatistics(torch.zeros(C, A), torch.ones(C, dtype=torch.int64))
    interpreter = config.INTERPRETER
    general = replace(interpreter, single_launch=replace(interpreter.single_launch, classes=0))
    with config.use(general), watching(excused=EXCUSED) as state, recording() as launches:
        loss, saved = backend.loss_forward(inputs, options, NEEDS, stream)
        backend.loss_backward(inputs, options, saved, torch.ones_like(loss), NEEDS)
    modelled = [work_of(launch, len(problem.labels.unique())).bytes for launch in launches]
    return [(*moved, bytes_) for moved, bytes_ in zip(state.moved, modelled, strict=True)]


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_bytes_of_the_model_are_those_that_kernels_move(structure):
    found = moved_and_modelled(structure, absent=False)
    assert len(found) == {"full": 6, "diag": 5}[structure]
    assert [(name, moved) for name, moved, _ in found] == [(name, m) for name, _, m in found]


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_of_a_class_without_rows_nothing_counts(structure):
    for name, moved, modelled in moved_and_modelled(structure, absent=True):
        assert 0.8 * modelled < moved <= modelled, name


@pytest.mark.parametrize(
    ("change", "programs"),
    [
        ({}, 4),  # 104 registers of 256 threads are 26,624 of 65,536: two; with 4 warps four
        ({"registers": 255}, 2),
        ({"registers": 32}, 16),  # 64 warps
        ({"registers": 32, "shared": 100 * 1024}, 2),
        ({"registers": 32, "shared": 227 * 1024}, 1),
    ],
)
def test_what_a_multiprocessor_holds(change, programs):
    assert resident(H200, replace(USED, **change), warps=4) == programs


@pytest.mark.parametrize("shape", ["cifar10-r32", "cifar10-wrn", "imagenet-diag"])
def test_every_launch_of_a_step_is_predicted(shape):
    _, launches = next(recorded(SHAPES[shape], "sm_90"))
    for launch in launches:
        found = predict(H200, launch, USED, work_of(launch, 5), [4, 4, 1, 20, 3])
        assert found["us"] > 1e6 * H200.start
        assert 0 < found["working_programs"] <= torch.Size(launch.grid).numel()


def test_the_slowest_part_decides():
    _, launches = next(recorded(SHAPES["cifar10-wrn"], "sm_90"))
    (launch,) = (each for each in launches if each.kernel.fn.__name__ == "class_pass_kernel")
    counts = [4, 4, 1, 20, 3]
    tasks = tasks_of(launch, launch.leaves(), counts)
    assert sum(programs for programs, _ in tasks) == 55 * 5
    assert max(reads for _, reads in tasks) == tasks[3][1] > tasks[2][1]

    def bound(work: Work) -> tuple[str, float]:
        found = predict(H200, launch, USED, work, counts)
        return found["bound"], found["us"]

    assert bound(Work(1.0, 1.0))[0] == "chain"
    name, us = bound(Work(4.08e9, 1.0))  # a millisecond at 85 % of 4.8 TB/s
    assert name == "bytes"
    assert us == pytest.approx(1002, abs=0.1)
    assert bound(Work(1.0, 1e12))[0] == "operations"
    slower = predict(H200, launch, USED, Work(1.0, 1e12), counts, has_wgmma=False)["us"]
    start = 1e6 * H200.start
    assert slower - start == pytest.approx((bound(Work(1.0, 1e12))[1] - start) / 0.63, rel=1e-3)


@pytest.mark.parametrize(
    ("tasks", "reads"),
    [
        ([(5, 3)], 6),  # two rounds
        ([(4, 3)], 3),
        ([(1, 100), (40, 3)], 100),  # the others pass beside the longest
        ([(4, 10), (400, 3)], 310),
    ],
)
def test_programs_wait_for_each_other_in_rounds_and_beside_longer_ones(tasks, reads):
    assert waits(tasks, slots=4) == reads
