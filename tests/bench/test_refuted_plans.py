"""The first run on a GPU asks of plans and replays what Triton itself computes, and drops them."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu.accuracy import make_state
from bench.gpu.device import Ceilings
from bench.gpu.half_hour import plans_left
from bench.gpu.parts import Run, refute_plans, repeated
from bench.measuring.shapes import Shape, make_problem
from iada_kernels.triton import config, launch, plans, replay
from tests.helpers.planned_interpreter import plan_in_the_interpreter

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="faults are planted in the interpreter"),
    pytest.mark.usefixtures("one_thread"),
]

SHAPE = Shape("tiny", 12, 3, 8, "full")
SEVERAL = replace(
    config.INTERPRETER, single_launch=replace(config.INTERPRETER.single_launch, rows=0)
)


@pytest.fixture(params=[config.INTERPRETER, SEVERAL], ids=["one launch", "several launches"])
def arguments(request, monkeypatch):
    """Of `repeated`."""
    plan_in_the_interpreter(monkeypatch)
    problems = tuple(make_problem(SHAPE, seed) for seed in (0, 1))
    with config.use(request.param):
        yield SHAPE, problems, make_state(SHAPE, problems[0])


def refuted(arguments):
    run = Run(torch.device("cpu"), 100, Ceilings(bytes=3e12, float32=5e13, tf32=3e14))
    run.part = "errors"
    refute_plans(run, "tiny", *arguments)
    return run.plans, run.failures.get("errors", [])


def replays_err(monkeypatch):
    run, ran = replay.Replay.__call__, []

    def off_by_one(self, *given):
        result = run(self, *given)
        ran.append(self)
        if isinstance(result, tuple) and isinstance(result[0], torch.Tensor):
            result[0].add_(1)  # of the forward pass the loss
        return result

    monkeypatch.setattr(replay.Replay, "__call__", off_by_one)
    return ran


def test_what_is_right_is_kept(arguments):
    assert refuted(arguments) == ("replays", [])


def test_wrong_replays_are_left_out(arguments, monkeypatch):
    ran = replays_err(monkeypatch)
    level, (failure,) = refuted(arguments)  # plans are asked too, and found to be right
    assert ran
    assert level == "plans"
    assert "replays differ from Triton's launches, so plans: ['loss of call" in failure
    assert plans.ALLOWED.level == "replays"  # of the run alone
    ran.clear()
    assert repeated(*arguments, "none") == []
    assert not ran


def test_replays_that_raise_are_left_out(arguments, monkeypatch):
    def raises(self, *given):
        raise TypeError("an address")

    monkeypatch.setattr(replay.Replay, "__call__", raises)
    level, failures = refuted(arguments)
    assert level == "plans"
    assert "TypeError: an address" in failures[0]


def test_wrong_plans_are_left_out(arguments, monkeypatch):
    replays_err(monkeypatch)
    monkeypatch.setattr(plans.Call, "start", lambda *_: None)
    level, failures = refuted(arguments)
    assert level == "none"
    assert len(failures) == 2
    assert "replays differ" in failures[0]
    assert "plans differ" in failures[1]


def test_stages_go_on_without_what_was_refuted(tmp_path):
    assert plans_left(tmp_path) == {}
    (tmp_path / "gpu-x.json").write_text('{"plans": "none"}')
    assert plans_left(tmp_path) == {"IADA_TRITON_PLANS": "none"}


def test_a_level_is_named():
    with pytest.raises(ValueError, match=r"IADA_TRITON_PLANS: expected one of 'replays', 'plans'"):
        plans.ALLOWED.set("off")
    with plans.allowing("none"), plans.allowing("plans"):
        assert (plans.ALLOWED.plans, plans.ALLOWED.replays) == (True, False)
    assert plans.ALLOWED.level == "replays"
