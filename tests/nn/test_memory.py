"""Memory of the loss: no temporary of the eager form, and a peak of a few N×C at a dense shape."""

import os
import subprocess
import sys

import pytest
import torch

import iada
from tests.helpers.largest_output import LargestOutput
from tests.helpers.problems import eager, fused, random_problem, value_and_gradients

pytestmark = pytest.mark.slow

DENSE = {"rows": 131_072, "classes": 19, "width": 256}
ROW_BY_CLASS = DENSE["rows"] * DENSE["classes"] * 4  # bytes of one N×C
ROW_BY_WIDTH = DENSE["rows"] * DENSE["width"] * 4  # bytes of one N×A


def test_a_loss_that_is_kept_keeps_no_table(compiled_target):
    """As F.cross_entropy: what the backward pass needed goes with the graph."""
    backend, device = compiled_target
    rows, classes, width = 37, 11, 5
    features = torch.randn(rows, width, device=device, requires_grad=True)
    weight = torch.randn(classes, width, device=device, requires_grad=True)
    labels = torch.arange(rows, device=device) % classes
    losses = []
    for _ in range(3):
        loss = iada.fused_loss(features, weight, None, labels, backend=backend)
        node = loss.grad_fn
        assert any(t is not None and t.shape == (rows, classes) for t in node.saved_tensors)
        loss.backward()
        losses.append(loss)
        with pytest.raises(RuntimeError, match="after they have already been freed"):
            _ = node.saved_tensors
        assert not tables_in(vars(node))


def tables_in(values):
    """Tensors in nested containers."""
    found = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list | dict):
            found += tables_in(value)
    return found


# The largest tensor ---------------------------------------------------------------------------


def largest_output(loss_of, problem):
    with LargestOutput() as watch:
        value_and_gradients(loss_of, problem)
    return watch


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_no_temporary_of_the_eager_form(structure, compiled_target):
    """With N much larger than C: nothing of N×C×A, nothing of N×A×A, in forward and backward."""
    backend, device = compiled_target  # the interpreter copies whole storages
    rows, classes, width = 512, 24, 48
    terms = {"structure": structure, "dtype": torch.float32, "margin": 0.0}
    problem = random_problem(rows, classes, width, **terms).to(device)
    ours = largest_output(fused(backend), problem)
    assert ours.numel <= classes * width * max(classes, width), ours.maker
    assert largest_output(eager, problem).numel >= rows * classes * width


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_blocks_bound_the_scratch_of_few_rows(structure, block_elements):
    """With N < C the table has N rows, and its scratch is cut as soon as it exceeds a block."""
    rows, classes, width = 40, 64, 48
    terms = {"structure": structure, "dtype": torch.float32, "margin": 0.0}
    problem = random_problem(rows, classes, width, **terms)
    block_elements(10_000)
    inputs = max(tensor.numel() for tensor in problem.tensors())
    ours = largest_output(fused("torch"), problem)
    assert ours.numel <= max(10_000, inputs), ours.maker
    assert largest_output(eager, problem).numel >= rows * width * min(classes, width)


# The peak -------------------------------------------------------------------------------------


def test_dense_peak_is_below_four_rows_by_classes(compiled_target):
    backend, device = compiled_target
    peak = measure_in_a_fresh_process(backend, device.type)
    kept = ROW_BY_WIDTH // 4 if backend == "triton" else 0  # the signs, one byte each
    assert peak - kept < 4 * ROW_BY_CLASS, f"{peak / ROW_BY_CLASS:.1f} times N×C"


def test_the_measure_sees_a_row_by_width_tensor():
    """Without blocks the sign is one tensor N×A: the bound above is then broken."""
    peak = measure_in_a_fresh_process("torch", "cpu", block_elements=2**40)
    assert peak > ROW_BY_WIDTH > 4 * ROW_BY_CLASS


def measure_in_a_fresh_process(backend, device, block_elements=None):
    """Bytes of `dense_peak` where no earlier test has left freed memory to reuse."""
    if device == "cpu" and not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of a process is read from /proc")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # Large tensors come from mmap, so that freed ones leave at once (glibc adapts otherwise).
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, backend, device, str(block_elements or "")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def dense_arguments(rows, device):
    """A segmentation batch: skewed labels, a tenth of them ignored; no temporary of its size."""
    generator = torch.Generator(device).manual_seed(0)
    classes, width = DENSE["classes"], DENSE["width"]

    def normal(*size):
        return torch.randn(size, generator=generator, device=device)

    factor = normal(classes, width, width) / width**0.5
    share = 0.7 ** torch.arange(classes + 1.0, device=device)
    labels = torch.multinomial(share, rows, replacement=True, generator=generator)
    labels[labels == 1] = 255
    labels[labels == classes] = 1
    leaves = {
        "features": normal(rows, width),
        "weight": normal(classes, width) / width**0.5,
        "bias": normal(classes),
        "epsilon": normal(rows).tanh_(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, {"labels": labels, "covariance": factor @ factor.mT, "ignore_index": 255}


def dense_peak(backend, device):
    """Peak bytes of forward and backward beyond the inputs and the gradients returned."""
    for rows in (512, DENSE["rows"]):  # the first warms up: libraries, threads, workspaces
        leaves, others = dense_arguments(rows, device)
        before = start_of_peak(device)
        loss = iada.fused_loss(**leaves, **others, backend=backend)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        peak = end_of_peak(device) - before - sum(grad.nbytes for grad in grads)
        assert loss.isfinite()
    return peak


def start_of_peak(device):
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Where the high-water mark cannot be reset it was set before, and the peak errs upwards.
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return resident("VmRSS")


def end_of_peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(field):
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def main(backend, device, block_elements):
    if block_elements:
        from iada_kernels.torch_ops import blocking, quadratic

        blocking.BLOCK_ELEMENTS = quadratic.BLOCK_ELEMENTS = int(block_elements)
    print(dense_peak(backend, device))


if __name__ == "__main__":
    main(*sys.argv[1:])
