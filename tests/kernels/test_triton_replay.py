"""Replays compute what the calls that they stand for compute, bit for bit, on other tensors."""

import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from iada_kernels import contract
from iada_kernels.contract import ClassStatistics, LossInputs, LossNeeds, LossOptions
from iada_kernels.dispatch import triton_backend
from iada_kernels.triton import config, launch, replay
from tests.conftest import _targets
from tests.helpers.planned_interpreter import plan_in_the_interpreter
from tests.helpers.problems import cotangent, random_problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_SERVED = any(target.backend == "triton" for target in _targets())
pytestmark = pytest.mark.skipif(not IS_SERVED, reason="triton serves no device here")

EVERYTHING = LossNeeds(*[True] * 6)
GENERAL = replace(
    config.INTERPRETER,
    single_launch=replace(config.INTERPRETER.single_launch, rows=0),
    split_rows=16,  # so that partials are added up
)


@pytest.fixture
def replays(monkeypatch):
    """Those that ran, counted."""
    if launch.INTERPRETED:
        plan_in_the_interpreter(monkeypatch)
    ran = []
    run = replay.Replay.__call__

    def count(self, *arguments):
        ran.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(replay.Replay, "__call__", count)
    return ran


def inputs_of(seed, rows=17, classes=3, width=18, **terms):
    terms = {"structure": "full", "dtype": torch.float32, "ignored": 0.1} | terms
    problem = random_problem(rows, classes, width, seed=seed, margin=1e-4, **terms).to(DEVICE)
    return LossInputs(*(getattr(problem, name) for name in LossInputs._fields))


def statistics(inputs):
    mean = torch.linspace(-1, 1, inputs.weight.numel()).view(inputs.weight.shape)
    count = torch.arange(len(mean))
    return ClassStatistics(mean.to(DEVICE, inputs.covariance.dtype), count.to(DEVICE))


def copies(inputs):
    return LossInputs(*(None if each is None else each.clone() for each in inputs))


def loss_pass(inputs, options, needs, streams, backwards=1):
    """Everything that comes out of it or that it changes."""
    passes, stream = triton_backend(), statistics(inputs) if streams else None
    loss, saved = passes.loss_forward(inputs, options, needs, stream)
    results = [loss]
    if any(needs):
        for _ in range(backwards):
            grads = passes.loss_backward(inputs, options, saved, cotangent(loss), needs)
            results += grads.tensors()
    if stream is not None:
        results += [inputs.covariance, stream.mean, stream.count]
    return results


def update_pass(inputs):
    state = statistics(inputs)
    triton_backend().covariance_update(
        inputs.covariance, state.mean, state.count, inputs.features, inputs.labels
    )
    return [inputs.covariance, state.mean, state.count]


def hypergradient_pass(inputs, options):
    passes, weight = triton_backend(), inputs.weight
    tangents = contract.HeadTangents(inputs.features.flip(0), weight.flip(0), weight.sum(1))
    wanted = inputs.covariance is not None
    grad, sums = passes.hypergradient(inputs, options, tangents, wanted)
    if wanted:
        passes.covariance_step(inputs.covariance, weight, tangents.weight, sums, 0.1)
    return [grad, inputs.covariance]


def assert_replayed(call, replays, make=inputs_of, at_least=1):
    """The third of three calls, on tensors of its own."""
    for seed in range(2):
        call(make(seed))
    inputs = make(2)
    with launch.recording():  # Triton's way, with no plan
        expected = call(copies(inputs))
    before = len(replays)
    found = call(inputs)
    assert len(replays) - before >= at_least
    for have, want in zip(found, expected, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            assert have.dtype == want.dtype
            assert torch.equal(have, want)


@pytest.mark.parametrize(
    ("structure", "streams", "general", "reduction"),
    [
        ("full", False, False, "mean"),
        ("full", True, False, "sum"),
        (None, False, False, "mean"),
        ("full", False, True, "mean"),
        ("full", True, True, "none"),
        ("diag", False, True, "mean"),
        ("diag", True, True, "sum"),
        (None, False, True, "mean"),
    ],
)
def test_loss(replays, structure, streams, general, reduction):
    needs = EVERYTHING._replace(covariance=structure is not None and not streams)
    options = LossOptions(0.7, 0.9, reduction=reduction)
    with config.use(GENERAL if general else config.INTERPRETER):
        assert_replayed(
            lambda inputs: loss_pass(inputs, options, needs, streams, backwards=2),
            replays, lambda seed: inputs_of(seed, structure=structure), at_least=3,
        )  # fmt: skip


@pytest.mark.parametrize("name", LossNeeds._fields)
def test_each_gradient_alone(replays, name):
    needs = LossNeeds(*[False] * 6)._replace(**{name: True})
    with config.use(GENERAL):
        assert_replayed(lambda inputs: loss_pass(inputs, LossOptions(), needs, False), replays)


@pytest.mark.parametrize("absent", ["bias", "epsilon", "log_prior"])
def test_without(replays, absent):
    needs = EVERYTHING._replace(covariance=False, **{absent: False})
    with config.use(GENERAL):
        assert_replayed(
            lambda inputs: loss_pass(inputs, LossOptions(), needs, True), replays,
            lambda seed: inputs_of(seed, **{absent: False}), at_least=2,
        )  # fmt: skip


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_update(replays, structure):
    assert_replayed(update_pass, replays, lambda seed: inputs_of(seed, structure=structure))


@pytest.mark.parametrize("structure", ["full", "diag", None])
def test_hypergradient_and_step(replays, structure):
    assert_replayed(
        lambda inputs: hypergradient_pass(inputs, LossOptions()), replays,
        lambda seed: inputs_of(seed, structure=structure),
        at_least=1 if structure is None else 2,
    )  # fmt: skip


@pytest.mark.parametrize("features", [torch.float64, torch.bfloat16])
def test_other_dtypes(replays, features):
    with config.use(GENERAL):
        assert_replayed(
            lambda inputs: loss_pass(inputs, LossOptions(), EVERYTHING, False), replays,
            lambda seed: inputs_of(seed, dtypes={"features": features}), at_least=2,
        )  # fmt: skip


def test_inputs_that_have_to_be_copied_first(replays):
    layouts = {"weight": "transposed", "features": "step", "epsilon": "step", "bias": "expanded"}
    with config.use(GENERAL):
        assert_replayed(
            lambda inputs: loss_pass(inputs, LossOptions(), EVERYTHING, False), replays,
            lambda seed: inputs_of(seed, layouts=layouts), at_least=2,
        )  # fmt: skip


def test_scratch_too_large_to_be_packed(replays, monkeypatch):
    monkeypatch.setattr(replay, "LARGEST_PART", 0)
    with config.use(replace(GENERAL, group=2048)):  # no plan of another test
        assert_replayed(lambda inputs: loss_pass(inputs, LossOptions(), EVERYTHING, False), replays)
    assert all(each.scratch is None for each in replays)


def test_packed_scratch_does_not_overlap(replays):
    with config.use(GENERAL):
        assert_replayed(
            lambda inputs: loss_pass(
                inputs, LossOptions(), EVERYTHING._replace(covariance=False), True
            ),
            replays,
        )
    packed = [each for each in replays if each.scratch is not None]
    assert any(len(each.offsets) > 3 for each in packed)
    for each in packed:
        ends = [*each.offsets[1:], each.scratch().nbytes]
        assert all(
            end - start >= replay.PART_ALIGNMENT
            for start, end in zip(each.offsets, ends, strict=True)
        )
        assert all(offset % replay.PART_ALIGNMENT == 0 for offset in each.offsets)


def test_numbers_are_those_of_the_call(replays):
    """A schedule of α goes the way of plans, and comes back to replays where α stays."""
    for step, alpha in enumerate([0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.1]):
        inputs, options = inputs_of(step), LossOptions(alpha)
        with launch.recording():
            (expected,) = loss_pass(inputs, options, LossNeeds(*[False] * 6), False)
        before = len(replays)
        (found,) = loss_pass(inputs, options, LossNeeds(*[False] * 6), False)
        assert torch.equal(found, expected)
        assert len(replays) - before == (step in (2, 6, 7))


def test_the_same_tensor_twice_is_not_taken_for_one(replays):
    needs = LossNeeds(*[False] * 6)
    for step in range(6):
        inputs = inputs_of(step)
        if step < 4:
            inputs = inputs._replace(log_prior=inputs.bias)
        with launch.recording():
            expected = loss_pass(inputs, LossOptions(), needs, False)
        found = loss_pass(inputs, LossOptions(), needs, False)
        assert torch.equal(found[0], expected[0])


def test_a_replayed_update_is_told_to_autograd(replays):
    for seed in range(4):
        inputs = inputs_of(seed)
        state = statistics(inputs)
        tensors = [inputs.covariance, state.mean, state.count]
        before = [tensor._version for tensor in tensors]
        triton_backend().loss_forward(inputs, LossOptions(), EVERYTHING, state)
        assert all(t._version > v for t, v in zip(tensors, before, strict=True))
    assert replays


def test_nothing_of_a_call_is_kept(replays):
    """Neither what was given nor what came out."""
    seen = []
    for seed in range(4):
        inputs = inputs_of(seed)
        results = loss_pass(inputs, LossOptions(), EVERYTHING, False)
        seen += [weakref.ref(tensor) for tensor in (*inputs, *results)]
        del inputs, results
    gc.collect()
    assert replays
    assert not any(ref() is not None for ref in seen)


def traced(operation, *tensors):
    trace = replay.Trace(tensors)
    with trace:
        result = operation(*tensors)
    return trace.replay(result)


def test_operators_between_launches():
    def operation(x, y):
        total = (x * y).sum(dim=0)
        return total.reshape(-1, 1), (x, 3), torch.zeros(2, dtype=torch.int32)

    found = traced(operation, torch.rand(3, 4), torch.rand(3, 4))
    x, y = torch.rand(3, 4), torch.rand(3, 4)
    total, (first, three), zeros = found([x, y], None)
    assert torch.equal(total, (x * y).sum(dim=0).reshape(-1, 1))
    assert first is x
    assert three == 3
    assert torch.equal(zeros, torch.zeros(2, dtype=torch.int32))


ELSEWHERE = torch.rand(3, 4)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x * ELSEWHERE,
        lambda x: ELSEWHERE,
        lambda x: x.max(dim=0).values,
        lambda x: x * float(x.sum()),
        lambda x: torch.cat([x, x]),
        lambda x: {"x": x},
    ],
    ids=["operand", "result", "several results", "number", "list", "dictionary"],
)
def test_what_cannot_be_replayed(operation):
    assert traced(operation, torch.rand(3, 4)) is None


def test_a_record_that_callers_can_change_is_theirs():
    found = traced(lambda x: contract.LossGradients(), torch.rand(3))
    first = found([torch.rand(3)], None)
    first.weight = torch.rand(3)
    assert found([torch.rand(3)], None) == contract.LossGradients()


def test_tensors_that_cannot_be_traced():
    with torch.inference_mode():
        x = torch.rand(3)
    y = torch.rand(3)
    assert not replay.traceable([x])
    assert not replay.traceable([y, y])
    assert replay.traceable([y, y.detach()])


def test_an_update_of_shared_memory_is_not_replayed():
    """Versions would not tell which of the tensors was updated."""

    def operation(x, y):
        torch.autograd.graph.increment_version((x,))

    x, y = torch.rand(3), torch.rand(3)
    assert traced(operation, x, x.detach()) is None
    before = [x._version, y._version]
    traced(operation, torch.rand(3), torch.rand(3))([x, y], None)
    assert [x._version, y._version] == [before[0] + 1, before[1]]


def test_large_tensors_go_when_they_have_been_used(monkeypatch):
    monkeypatch.setattr(replay, "LARGEST_PART", 64)
    seen = []

    def first(record, *, stream=None):
        seen.append(weakref.ref(record[0]))

    def second(tensor, *, stream=None):
        seen.append(seen[-1]() is None)

    trace = replay.Trace([])
    with trace:
        large, other = torch.empty(100), torch.empty(100)
        trace.launch(first, ((large, 3),))
        trace.launch(second, (other,))
    found = trace.replay((other,))
    del large, other
    assert found([], None)[0].shape == (100,)
    assert seen[1] is True
    assert found.scratch is None


class Watching(TorchDispatchMode):
    """Of the user: it pairs operators of one call with those of another, say."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_user_sees_each_call_do_the_same(replays):
    inputs = inputs_of(0)
    seen = []
    for _ in range(2):
        for _ in range(2):
            with Watching() as watching:
                triton_backend().loss_forward(inputs, LossOptions(), EVERYTHING)
            seen.append(watching.seen)
        for _ in range(2):
            triton_backend().loss_forward(inputs, LossOptions(), EVERYTHING)
    assert seen[0]
    assert all(each == seen[0] for each in seen)
    assert replays, "between and after"


def test_one_thread_traces_at_a_time(replays):
    """A mode's flags are of the process, and two that end in another order leave them set."""
    inputs, options = inputs_of(0), LossOptions(0.25)
    with launch._tracing:
        for _ in range(4):
            triton_backend().loss_forward(inputs, options, EVERYTHING)
        assert not replays
    for _ in range(2):
        triton_backend().loss_forward(inputs, options, EVERYTHING)
    assert len(replays) == 1
    assert not launch._tracing.locked()


def test_zeros_of_either_sign_are_two_numbers(replays):
    for step, beta in enumerate([0.0, 0.0, 0.0, -0.0, -0.0]):
        before = len(replays)
        triton_backend().loss_forward(inputs_of(step), LossOptions(0.3, beta), EVERYTHING)
        assert len(replays) - before == (step == 2)


WITHOUT_DYNAMO = """
import sys, torch
from iada_kernels.triton.replay import Trace
with Trace([]):
    torch.empty(3)
sys.exit("torch._dynamo" in sys.modules)
"""


def test_a_trace_does_not_import_dynamo():
    """Which takes longer than a thousand steps."""
    subprocess.run([sys.executable, "-c", WITHOUT_DYNAMO], check=True)
