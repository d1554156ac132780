"""`python -m bench.classes`: forward and backward of a head of very many classes, on a CPU.

Against a plain cross-entropy that takes `--chunk` rows at a time, and their gradients at once: the
least work that torch's operators can do in bounded memory. Time is the processor's, so that other
work on the machine counts little; memory is what the peak has beyond inputs and gradients.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import iada
from bench.measuring.memory import peak_bytes
from iada_kernels.environment import environment, headline


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.classes", description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64, help="rows (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    sides = sides_of(options.samples, options.classes, options.features, options.chunk)
    seconds: dict[str, list[float]] = {name: [] for name in options.sides}
    extra = dict.fromkeys(options.sides, 0)
    for _ in range(options.rounds):
        for name in options.sides:
            spent, beyond = measure(sides[name])
            seconds[name].append(spent)
            extra[name] = max(extra[name], beyond)
    machine = environment()
    print(headline(machine, {"fused_loss": machine["backend"]}) + "\n")
    print("| loss | processor, s | peak beyond inputs and gradients, MiB |\n|---|---:|---:|")
    for name in options.sides:
        print(f"| {SIDES[name]} | {statistics.median(seconds[name]):.2f} | {extra[name] >> 20} |")
    return 0


SIDES = {
    "chunked": "cross-entropy, rows in chunks",
    "fused": "fused_loss",
    "epsilon": "fused_loss with ε",
    "diag": "fused_loss with a diagonal Σ",
}


def sides_of(
    samples: int, classes: int, width: int, chunk: int
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What each side calls for its gradients; random tensors, never zeros."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.empty(*size).normal_(generator=generator)

    features = normal(samples, width).requires_grad_()
    weight = normal(classes, width).mul_(width**-0.5).requires_grad_()
    epsilon = normal(samples).tanh_().requires_grad_()
    labels = torch.randint(classes, (samples,), generator=generator)
    sigma = torch.rand(classes, width, generator=generator)

    def fused(**terms: Any) -> tuple[Tensor, ...]:
        leaves = [features, weight, *(t for t in terms.values() if t.requires_grad)]
        return torch.autograd.grad(iada.fused_loss(features, weight, None, labels, **terms), leaves)

    @torch.no_grad()
    def chunked() -> tuple[Tensor, ...]:
        grad_features, grad_weight = torch.empty_like(features), torch.zeros_like(weight)
        for rows in torch.arange(samples).split(chunk):
            z = F.linear(features[rows], weight)
            residual = z.sub_(z.logsumexp(dim=1, keepdim=True)).exp_()
            residual[range(len(rows)), labels[rows]] -= 1
            residual /= samples
            grad_features[rows] = residual @ weight
            grad_weight.addmm_(residual.T, features[rows])
        return grad_features, grad_weight

    return {
        "chunked": chunked,
        "fused": fused,
        "epsilon": lambda: fused(epsilon=epsilon),
        "diag": lambda: fused(covariance=sigma),
    }


def measure(side: Callable[[], tuple[Tensor, ...]]) -> tuple[float, int]:
    """Seconds of processor, and bytes of the peak beyond what is there before and what returns."""
    gradients: list[Tensor] = []
    start = time.process_time()
    peak = peak_bytes(lambda: gradients.extend(side()))
    spent = time.process_time() - start
    return spent, peak - sum(gradient.nbytes for gradient in gradients)


if __name__ == "__main__":
    sys.exit(main())
