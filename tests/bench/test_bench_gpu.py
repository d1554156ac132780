"""`bench.gpu` without a GPU: its whole path on tiny shapes, and the pieces that judge and count."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu.accuracy import judged
from bench.gpu.contestants import why_not_eager
from bench.gpu.device import Ceilings, Stopwatch
from bench.gpu.kernel_times import matched
from bench.gpu.table import table
from bench.measuring.shapes import SHAPES
from bench.offline.launches import recorded
from bench.offline.work import OPERATIONS, work_of

pytestmark = pytest.mark.slow
CEILINGS = Ceilings(bytes=3e12, float32=5e13, tf32=3e14)


def run_dry(out, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out)],
        env={k: v for k, v in (os.environ | environment).items() if v},
        capture_output=True,
        text=True,
    )


def test_a_dry_run_needs_the_interpreter(tmp_path):
    done = run_dry(tmp_path, TRITON_INTERPRET="")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr


def test_errors_are_judged_by_torch_own():
    want = {"weight": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    want |= {"epsilon": torch.tensor([1.0, 5.0], dtype=torch.float64), "count": torch.tensor([3])}

    def result(weight, epsilon=(1.0, 5.0), count=3):
        return {
            "weight": torch.tensor(weight),
            "epsilon": torch.tensor(epsilon),
            "count": torch.tensor([count]),
        }

    sure = torch.tensor([True, False])
    torch_way = result([1.0, 2.001])

    def within(ours):
        return {name: e["within"] for name, e in judged(ours, torch_way, want, sure, 1.0).items()}

    assert within(result([1.003, 2.0])) == {"weight": True, "epsilon": True, "count": True}
    assert not within(result([1.005, 2.0]))["weight"]
    assert not within(result([torch.nan, 2.0]))["weight"]
    assert within(result([1.0, 2.0], (1.0, 9.0)))["epsilon"]  # an uncertain sign
    assert not within(result([1.0, 2.0], (1.1, 5.0)))["epsilon"]
    assert not within(result([1.0, 2.0], count=4))["count"]


def test_profiled_kernels_are_matched_in_order():
    names = ["a", "b", "a"]
    events = [
        (10.0 * place, name, 1.0 + place) for place, name in enumerate(["a", "b", "x", "a"] * 3)
    ]
    assert matched(events[::-1], names, 3) == pytest.approx([5e-6, 6e-6, 8e-6])
    assert matched(events[:-1], names, 3) is None
    assert matched(events, ["b", "a", "a"], 3) is None


def launch_of(name, shape, part, place=0):
    """A launch of the kernel `name` at a reference shape, on an sm_90."""
    for found, launches in recorded(SHAPES[shape], "sm_90"):
        named = [each for each in launches if each.kernel.fn.__name__ == name]
        if found == part:
            return named[place]
    raise AssertionError(part)


def test_work_of_the_class_pass():
    both = launch_of("class_pass_kernel", "cifar10-wrn", "step")
    read = launch_of("class_pass_kernel", "cifar10-wrn", "hypergradient")
    sigma, partials, total = 5 * 640 * 640, 5 * 55 * 10, 5 * 10
    partials = 2 * partials + total  # written, read by the last program, which writes their sums
    read_bytes, both_bytes = work_of(read, present=5).bytes, work_of(both, present=5).bytes
    head, size, rows = 10 * 640, 10, 128
    groups = 4 * (2 * size + rows)  # size, start, order
    assert read_bytes == 4 * (sigma + 2 * partials + 2 * head) + groups
    streamed = 4 * (rows * 640 + 2 * 5 * 640 + size)  # features, center and shift, batch weight
    assert both_bytes == 4 * (2 * sigma + partials + head) + groups + streamed
    assert work_of(read, present=5).float_operations == 2 * 5 * 10 * 640**2
    assert work_of(both, present=5).float_operations == 128 * 640**2 + 5 * 10 * 640**2


def test_work_of_logits():
    first = work_of(launch_of("rows_and_logits_kernel", "cifar10-wrn", "step"), present=3)
    n, c, a = 128, 10, 640
    logits = 4 * (n * a + n * c + c * a + c) + 8 * n  # with the labels
    groups = 4 * (2 * c + n) + 2 * 8 * c + 4 * c  # size, start, order; count; batch weight
    assert first.bytes == logits + groups + 4 * (c + 1 + 4)  # a counter for each tile of rows
    second = work_of(launch_of("logits_kernel", "cifar10-wrn", "step"), present=3)
    terms = 4 * (c * c + c) + n * a + 4 * n  # R, log π; sign and ε
    loss = 4 * (2 * n + 2)  # losses, written and read; the loss and 1/n; D takes the place of z̃
    assert second.bytes == logits + terms + loss
    assert first.float_operations == second.float_operations == 2 * n * c * a
    diagonal = work_of(launch_of("logits_kernel", "imagenet-diag", "step"), present=3)
    assert diagonal.float_operations == 3 * 2 * 256 * 1000 * 2048


@pytest.mark.parametrize("shape", ["cifar10-r32", "cifar10-wrn", "imagenet-diag"])
def test_every_launch_has_its_work(shape):
    for _, launches in recorded(SHAPES[shape], "sm_90"):
        for each in launches:
            work = work_of(each, present=3)
            assert work.bytes > 0
            products, leaves = each.kernel.fn.__name__ in OPERATIONS, each.leaves()
            if each.kernel.fn.__name__ == "head_backward_kernel":  # its class sums alone have none
                products = "features_grid.rows" in leaves or "weight_grid.rows" in leaves
            for name, result in (("rows_and_logits", "z"), ("moments_and_sign", "sign")):
                if each.kernel.fn.__name__ == f"{name}_kernel":
                    products = leaves[result] is not None
            assert (work.float_operations > 0) == products


def test_three_tf32_products_make_one():
    assert CEILINGS.operations("tf32x3") == CEILINGS.tf32 / 3
    assert CEILINGS.operations("ieee") == CEILINGS.operations(None) == CEILINGS.float32


def test_the_host_s_share_of_a_step_is_timed_without_a_warning():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = ["-W", "error::UserWarning", "-m", "bench.host_time", "--raw", "--seconds", "0.05"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command, "--shapes", "cifar10-r32", "cifar10-wrn"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads(done.stdout)
    assert found.keys() == {"cifar10-r32", "cifar10-wrn"}
    assert min(found.values()) > 0
    # Of either shape's five or more batches of 50 steps, three or more took the median or longer.
    # Which of the two is longer is for a quiet machine to say.
    assert 3 * 50 * 1e-6 * sum(found.values()) <= taken


def test_sides_take_turns_on_a_device():
    calls = []
    watch = Stopwatch(torch.device("cpu"), rounds=4)
    taken = watch.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, host=True
    )
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4}
    assert calls[-4:] == ["a", "b", "a", "b"]


def test_eager_is_left_out_with_a_reason():
    assert why_not_eager(SHAPES["cifar100-wrn"], 7e10) == ""
    assert "GB" in why_not_eager(SHAPES["inat-diag"], 7e10)
    assert "ignored" in why_not_eager(SHAPES["dense"], 1e15)


def test_a_table_of_what_is_there():
    found = {
        "some": {
            "replayed": {"ms": {"triton": 2.0}, "by_triton": {"cross_entropy": 0.5, "eager": 60.0}},
            "with_torch_compiled": {
                "replayed": {"ms": {"triton": 9.0, "torch_compiled": 3.0}, "by_triton": {}}
            },
        },
        "none": {},
    }
    text = table(found, CEILINGS)
    assert "| some |  |  |  | 3.000 | 2.000 |  |  | 60.0× |  | 2.00× |" in text
    assert "launch by launch" not in text
