"""`python -m bench.one_step`: every Triton kernel once, for tools that watch from outside.

Without arguments small shapes with ignored rows, a class without rows and sizes that no tile
divides, for compute-sanitizer. With `--shape` steps of a reference shape, for a profiler.
"""

import argparse
import sys

import torch

from bench.gpu.accuracy import make_state
from bench.gpu.contestants import fused_side, loss_side
from bench.measuring.shapes import SHAPES, Problem, Shape, make_problem
from iada_kernels.contract import HeadTangents, LossNeeds, LossOptions
from iada_kernels.dispatch import INTERPRETED, triton_backend

SMALL = (
    Shape("full", 33, 7, 21, "full"),
    Shape("diag", 33, 7, 21, "diag"),
    Shape("dense", 70, 5, 20, "full", "skewed"),
    Shape("wide", 5, 3, 130, "full"),
    Shape("many", 9, 200, 18, "diag"),
    Shape("rows", 70, 130, 70, "full"),  # several tiles of rows and of classes, the softmax joined
)
ALL = LossNeeds(True, True, True, True, True, True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.one_step", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, metavar="NAME", help="a reference shape")
    parser.add_argument("--small", type=int, default=len(SMALL), help="how many small shapes")
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    device = torch.device("cpu" if INTERPRETED else "cuda")
    for shape in [SHAPES[options.shape]] if options.shape else SMALL[: options.small]:
        problem = make_problem(shape).to(device)
        step = fused_side(shape, problem, make_state(shape, problem), "triton")
        for _ in range(options.steps):
            step()
        if not options.shape:
            loss_side(shape, problem, "triton")()
            every_pass(shape, problem)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{shape}: done", flush=True)
    return 0


def every_pass(shape: Shape, problem: Problem) -> None:
    """The passes that a training step does not call, and all gradients of the loss."""
    passes, inputs = triton_backend(), problem.loss_inputs()
    options = LossOptions(0.5, 1.0, shape.ignore_index, "mean")
    _, saved = passes.loss_forward(inputs, options, ALL)
    one = torch.ones((), device=inputs.features.device)
    passes.loss_backward(inputs, options, saved, one, ALL)
    tangents = HeadTangents(
        torch.ones_like(inputs.features),
        torch.ones_like(inputs.weight),
        torch.ones_like(problem.bias),
    )
    _, sums = passes.hypergradient(inputs, options, tangents, True)
    covariance = problem.covariance.clone()
    passes.covariance_step(covariance, inputs.weight, tangents.weight, sums, 0.1)
    logits = inputs.features @ inputs.weight.T
    labels = inputs.labels.clamp(max=shape.classes - 1)
    passes.characteristics(inputs.features, logits, labels, inputs.weight, 3)


if __name__ == "__main__":
    sys.exit(main())
