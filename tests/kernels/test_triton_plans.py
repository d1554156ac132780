"""Planned launches are those that Triton would make; comparing them takes compiled kernels' keys.

The suite runs with interpreted kernels, which have none: that comparison has its own processes.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel

from iada_kernels.contract import LossInputs, LossNeeds, LossOptions
from iada_kernels.dispatch import triton_backend
from iada_kernels.triton import launch
from iada_kernels.triton.plans import Call, Plan, Plans, Unplannable, allowing, describe, starter
from iada_kernels.triton.replay import Trace

ROOT = Path(__file__).parents[2]


class Binary(CompiledKernel):
    """That notes where and how it would start."""

    module = run = None
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.started = []
        self.run = lambda *arguments: self.started.append(("directly", arguments))

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.started.append(
            ("described", grid, stream, arguments)
        )


def compared(*arguments: str) -> str:
    """What planned_process.py prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.planned_process", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_planned_launches_are_tritons_also_in_threads_and_after_errors():
    words = compared("sm_90").split()
    launches, addresses = int(words[0]), int(words[-2])
    assert launches > 4000
    assert addresses > 4000  # of scratch: these were launches of replays


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_no_piece_of_a_signature_can_be_left_out(architecture):
    found = compared(architecture, "--mutants")
    assert found.count("seen:") == (14 if architecture == "gfx942" else 13)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("level", ["replays", "none"])
def test_launches_go_to_the_device_of_the_tensors(monkeypatch, record, level):
    """cuda:1 where nobody called set_device: Triton launches on the current device."""
    current = [0]

    class OnFirst:
        def __init__(self, tensor_on):
            self.tensor_on = tensor_on

        def get_device(self):
            return self.tensor_on

    @contextlib.contextmanager
    def on(index):
        former, current[0] = current[0], index
        yield
        current[0] = former

    active = SimpleNamespace(
        get_current_device=lambda: current[0], get_current_stream=lambda device: device
    )
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(launch, "Tensor", OnFirst)
    seen = []
    operation = launch.planned(lambda first, scale: seen.append(current[0]))
    with allowing(level):
        for index in (1, 0, launch.ON_CPU, 1):
            tensor = OnFirst(index)
            operation((tensor, None) if record else tensor, scale=2.0)
    assert seen == [1, 0, 0, 1]
    assert current == [0]


def test_a_plan_is_what_was_noted():
    call, binary = Call(None, stream=3), Binary()
    call.note("kernel", (4, 2), binary, (64, "tf32"))
    (step,) = call.noted
    assert (step.kernel, step.grid, step.constants) == ("kernel", (4, 2), (64, "tf32"))
    step.start("x", 64, stream=3)
    expected = (4, 2, 1, 3, "function", "metadata", None, None, None, "x", 64)
    assert binary.started == [("directly", expected)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_are_told(name):
    binary, hooks = Binary(), getattr(triton.knobs.runtime, name)
    start = starter(binary, (4,))

    def listen(metadata):
        pass

    hooks.add(listen)
    try:
        start("x", stream=3)
    finally:
        hooks.remove(listen)
    start("x", stream=3)
    assert binary.started[0] == ("described", (4, 1, 1), 3, ("x",))
    assert binary.started[1][0] == "directly"


def test_a_launch_that_is_not_the_next_goes_tritons_way():
    first = Call(None, None)
    for kernel in ("a", "b"):
        first.note(kernel, (4,), Binary(), ())
    call = Call(Plan(tuple(first.noted), None), None)
    assert call.step("a", (4,)) is first.noted[0]
    assert call.step("b", (5,)) is None
    assert call.step("b", (4,)) is None, "a plan has an end"
    assert call.noted is None


def test_a_launch_that_is_not_the_next_is_in_no_replay():
    call = Call(Plan((), None), None, Trace([]))
    assert call.trace.replay(None) is not None
    assert call.step("a", (4,)) is None
    assert call.trace.replay(None) is None


def test_without_a_compiled_kernel_there_is_no_plan():
    call = Call(None, None)
    for compiled in (Binary(), None, Binary()):
        call.note("kernel", (1,), compiled, ())
    assert call.noted is None


def test_the_oldest_plans_go():
    plans = Plans(limit=2)
    for name in "abc":
        plans.keep((name,), Plan((), None))
    assert len(plans) == 2
    assert plans.find(("a",)) is None
    assert plans.find(("c",)) == Plan((), None)


def test_a_tensor_of_a_subclass_has_no_signature():
    class Special(Tensor):
        pass

    with pytest.raises(Unplannable, match="Special"):
        describe(0, (torch.ones(2).as_subclass(Special),))


def _loss():
    inputs = LossInputs(torch.randn(5, 4), torch.randn(3, 4), None, torch.tensor([0, 1, 2, 0, 1]))
    return triton_backend().loss_forward(inputs, LossOptions(), LossNeeds(*[False] * 6))[0]


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_the_interpreter_has_no_plans(monkeypatch):
    def describe(*arguments):
        raise AssertionError("planned")

    monkeypatch.setattr(launch, "describe", describe)
    assert _loss().isfinite()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with launch.recording(execute=False) as launches:  # nor have recordings
        _loss()
    assert launches
