"""Races, bounds and fresh memory of the Triton kernels, without a GPU.

tests/helpers/sanitizer.py watches each access of interpreted programs; test_triton_barriers.py
reads from compiled ones that a barrier of the source is a barrier of the binary.
"""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted on CPUs only", allow_module_level=True)

import triton
import triton.language as tl

from iada_kernels.contract import ClassStatistics, HeadTangents, LossNeeds
from iada_kernels.dispatch import select_backend
from iada_kernels.triton import config
from tests.helpers.interpreter import GENERAL
from tests.helpers.problems import random_problem
from tests.helpers.sanitizer import UnsafeAccess, watching
from tests.kernels.test_triton_compile import shipped_kernels

pytestmark = pytest.mark.slow

N, C, A = 24, 4, 34  # two tiles along A; of the classes, one is empty
KERNELS = {
    "single": config.INTERPRETER,
    "general": GENERAL,
    "softmax": replace(GENERAL, softmax_classes=0),  # a launch of its own
}
SMALL, WIDE = (N, C), (70, 20)  # rows and classes: of WIDE three tiles of rows, two of classes
# Structure of Σ, kernels, gradient by Σ alone and no ε, sizes.
CASES = [
    ("full", "single", False, SMALL),
    ("full", "single", True, SMALL),
    ("full", "general", False, SMALL),
    ("diag", "general", False, SMALL),
    (None, "single", False, SMALL),
    (None, "general", False, SMALL),
    (None, "general", False, WIDE),
    (None, "softmax", False, SMALL),
]
# In these the threads that overwrite an element are those that have read it: one tile is loaded
# and stored with the same pointers, and what other threads read of it a reduction has consumed,
# which ends in a barrier of its own.
EXCUSED = frozenset(
    {
        ("rows_and_logits_kernel", "overwrites", "count"),
        ("softmax_kernel", "overwrites", "z"),
        ("logits_kernel", "overwrites", "z"),
        ("curvature_kernel", "overwrites", "tangent"),
        ("variances_step_kernel", "overwrites", "covariance"),
        ("class_pass_kernel", "overwrites", "covariance"),
        ("moments_and_sign_kernel", "overwrites", "covariance"),
    }
)


def step(structure, kernels, alone, sizes):
    """Every pass once; all that they return or change, in one list."""
    dtype, (rows, classes) = torch.float32, sizes
    problem = random_problem(
        rows, classes, A, structure=structure, dtype=dtype, margin=0.0, epsilon=not alone
    )
    problem.labels[problem.labels == 3] = 1
    inputs, options = problem.records()
    backend = select_backend("triton", torch.device("cpu"))
    needs = LossNeeds(True, True, True, structure is not None, True, True)
    if alone:
        needs = LossNeeds(False, False, False, True, False, False)
    found = []
    with config.use(KERNELS[kernels]):
        stream = None
        if structure is not None:
            stream = ClassStatistics(
                torch.zeros(classes, A, dtype=dtype), torch.ones(classes, dtype=torch.int64)
            )
            found += [inputs.covariance, stream.mean, stream.count]
        loss, saved = backend.loss_forward(inputs, options, needs, stream)
        gradient = torch.full_like(loss, 1.5)
        found += [loss, *backend.loss_backward(inputs, options, saved, gradient, needs).tensors()]
        if kernels != "single":
            tangents = HeadTangents(inputs.features.sin(), inputs.weight.cos(), None)
            epsilon, sums = backend.hypergradient(inputs, options, tangents, structure is not None)
            found.append(epsilon)
            if sums is not None:
                backend.covariance_step(
                    inputs.covariance, inputs.weight, tangents.weight, sums, 0.3
                )
            labels, logits = inputs.labels.clamp(min=0), inputs.features[:, :classes].contiguous()
            found.append(backend.characteristics(inputs.features, logits, labels, inputs.weight, 3))
    return [tensor for tensor in found if tensor is not None]


@functools.cache
def expected(case):
    return step(*case)


@pytest.mark.parametrize("order", ["random", "interleaved"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_in_any_order_give_the_same_bits(case, order):
    """And none reads or writes what it must not."""
    with watching(order=order, seed=3, excused=EXCUSED):
        found = step(*case)
    for have, want in zip(found, expected(case), strict=True):
        assert torch.equal(have, want)


@functools.cache
def watched():
    """The kernels and the barriers that the cases run through."""
    kernels, barriers = set(), set()
    for case in CASES:
        with watching(excused=EXCUSED) as state:
            step(*case)
        kernels |= state.kernels
        barriers |= {(case, site) for site in state.barriers}
    return kernels, barriers


def test_every_kernel_is_watched():
    assert watched()[0] == shipped_kernels()


def test_every_barrier_is_needed():
    """Without any one of them, threads of one program could see another order of accesses."""
    _, barriers = watched()
    needed = set()
    for case, site in sorted(barriers, key=str):
        if site not in needed:
            try:
                with watching(excused=EXCUSED, void_barrier=site):
                    step(*case)
            except UnsafeAccess:
                needed.add(site)
    assert needed == {site for _, site in barriers}
    assert len(needed) >= 12


# What the sanitizer must see ------------------------------------------------------------------


@triton.jit
def _shift_kernel(source, out, N, AHEAD: tl.constexpr, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at, mask=at < N, other=0.0), mask=at < N)
    if WAIT:
        tl.debug_barrier()
    ahead = tl.load(out + at + AHEAD, mask=at < N, other=0.0)
    tl.debug_barrier()
    tl.store(source + at, ahead, mask=at < N)


@triton.jit
def _count_kernel(
    out, losses, arrived,
    ORDERED: tl.constexpr, COUNTERS: tl.constexpr, WAIT: tl.constexpr, LATE: tl.constexpr,
    SEM: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tl.store(losses + program, program)
    if WAIT:
        tl.debug_barrier()
    if ORDERED:
        count = tl.atomic_add(arrived + program % COUNTERS, 1, sem=SEM)
        last = count == tl.num_programs(0) // COUNTERS - 1
    else:
        last = program == tl.num_programs(0) - 1
    if LATE:
        tl.debug_barrier()
        tl.store(losses + program, program)
        tl.debug_barrier()
    if last:
        at = tl.arange(0, 4)
        tl.store(out + program, tl.sum(tl.load(losses + at, cache_modifier=CACHE), axis=0))


@triton.jit
def _add_kernel(out):
    tl.store(out, tl.load(out) + 1)


def shift(ahead=0, wait=True, size=16):
    source, out = torch.ones(size), torch.zeros(size)
    _shift_kernel[(1,)](source, out, 16, AHEAD=ahead, WAIT=wait, BLOCK=16)


def count(ordered, **changed):
    out, losses, arrived = torch.zeros(4), torch.zeros(4), torch.zeros(2, dtype=torch.int32)
    constants = {"COUNTERS": 1, "WAIT": True, "LATE": False, "SEM": "acq_rel", "CACHE": ".cg"}
    _count_kernel[(4,)](out, losses, arrived, ORDERED=ordered, **constants | changed)
    return out.sum().item()


def test_what_is_safe_passes():
    with watching():
        shift()
    for order in ("grid", "random", "interleaved"):
        with watching(order=order):
            assert count(True) == 6


@pytest.mark.parametrize(
    ("run", "rule"),
    [
        (lambda: shift(ahead=1), "bounds: out has 16 numbers, not 17"),
        (lambda: shift(size=8), "bounds"),
        (lambda: shift(wait=False), "threads: out is read after a store"),
        (lambda: count(False), r"programs: losses is .* another program"),
        (lambda: count(True, COUNTERS=2), r"programs: losses is .* another program"),
        (lambda: count(True, WAIT=False), r"programs: losses is .* another program"),
        (lambda: count(True, LATE=True), r"programs: losses is .* another program"),
        (lambda: count(True, SEM="relaxed"), "programs: arrived is counted in without acquire"),
        (lambda: count(True, CACHE=""), "programs: losses is read through the first-level cache"),
    ],
    ids=[
        *("past the end", "too small", "no barrier", "no atomic", "another counter"),
        *("no barrier before counting", "stored after counting", "relaxed", "first-level cache"),
    ],
)
@pytest.mark.parametrize("order", ["grid", "interleaved"])
def test_what_is_unsafe_is_seen(run, rule, order):
    with pytest.raises(UnsafeAccess, match=rule), watching(order=order):
        run()


def test_fresh_memory_is_seen():
    """A kernel that is left out leaves memory that no one has written."""
    from iada_kernels.triton import forward

    problem = random_problem(N, C, A, structure=None, dtype=torch.float32, margin=0.0)
    backend = select_backend("triton", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch, config.use(GENERAL):
        launch, left_out = forward.launch, forward.moments_and_sign_kernel
        patch.setattr(
            forward, "launch", lambda k, *a, **c: None if k is left_out else launch(k, *a, **c)
        )
        with pytest.raises(UnsafeAccess, match=r"fresh: samples.sign"), watching():
            backend.loss_forward(*problem.records(), LossNeeds(*[True] * 6))


def test_turns_are_taken():
    """An addition that is not atomic loses what others add meanwhile."""
    found = {}
    for order in ("grid", "random", "interleaved"):
        out = torch.zeros(1)
        known = {("_add_kernel", rule, "out") for rule in ("programs", "overwrites")}
        with watching(order=order, excused=frozenset(known)):
            _add_kernel[(8,)](out)
        found[order] = out.item()
    assert found["grid"] == found["random"] == 8
    assert found["interleaved"] < 8
