"""`python -m bench.low_rank`: full, diagonal and low-rank Σ at one shape, and how near low-rank is.

Streaming update, and loss with the gradients by features, W, b and ε, each in seconds of processor,
sides interleaved; a full Σ of more than `--most-gigabytes` is left out. With `--features FILE`, a
file of `python -m iada features`, instead: the error of a streamed low-rank Σ against the full one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import iada
from iada_kernels.environment import environment, headline


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.low_rank", description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=2048, help="features A (default 2048)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--most-gigabytes", type=float, default=2.0)
    parser.add_argument("--features", type=Path, help="an .npz of python -m iada features")
    parser.add_argument("--parts", type=int, default=1, help="each class in so many, by k-means")
    options = parser.parse_args()
    if options.parts < 1:
        parser.error(f"--parts: expected at least 1, got {options.parts}")
    machine = environment()
    backends = {"diag and full": machine["backend"], "rank r": "torch operators"}
    print(headline(machine, backends) + "\n")
    if options.features is not None:
        return show_errors(options.features, options.ranks, options.parts)
    return show_times(options)


def show_times(options: argparse.Namespace) -> int:
    classes, width = options.classes, options.width
    sides = {"diag": iada.ClassCovariance(classes, width, "diag")}
    if 4e-9 * classes * width * width <= options.most_gigabytes:
        sides["full"] = iada.ClassCovariance(classes, width)
    for rank in options.ranks:
        sides[f"rank {rank}"] = iada.ClassCovariance(classes, width, "low-rank", rank)
    generator = torch.Generator().manual_seed(0)
    share = 0.01 ** (torch.arange(classes) / max(1, classes - 1))
    weight = torch.empty(classes, width).normal_(generator=generator).mul_(width**-0.5)
    leaves = [weight.requires_grad_(), torch.zeros(classes).requires_grad_()]
    updates: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds + 1):
        features = torch.empty(options.samples, width).normal_(generator=generator)
        labels = torch.multinomial(share, options.samples, True, generator=generator)
        epsilon = torch.empty(options.samples).normal_(generator=generator).tanh_()
        given = [features.requires_grad_(), *leaves, epsilon.requires_grad_()]
        for name, state in sides.items():
            updates[name].append(seconds_of(lambda: state.update(features, labels)))  # noqa: B023
            losses[name].append(seconds_of(lambda: gradients(given, labels, state)))  # noqa: B023
    print("| Σ | MB | update, ms | loss and gradients, ms |\n|---|---:|---:|---:|")
    for name, state in sides.items():
        update, loss = (1e3 * statistics.median(t[name][1:]) for t in (updates, losses))
        print(f"| {name} | {state.covariance.nbytes / 1e6:.0f} | {update:.1f} | {loss:.1f} |")
    return 0


def gradients(
    given: list[Tensor], labels: Tensor, state: iada.ClassCovariance
) -> tuple[Tensor, ...]:
    features, weight, bias, epsilon = given
    loss = iada.fused_loss(features, weight, bias, labels, covariance=state, epsilon=epsilon)
    return torch.autograd.grad(loss, given)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def show_errors(path: Path, ranks: list[int], parts: int) -> int:
    """Of training features in batches of 128 at random, one pass."""
    from iada.experiments.datasets.features import read_features

    part = read_features(path)["train"]
    inputs: Tensor = part.inputs  # type: ignore[assignment]
    labels = in_parts(inputs, part.labels, parts)
    classes, width = int(labels.max()) + 1, inputs.shape[1]
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    full = iada.ClassCovariance(classes, width).double()
    print("| rank | Σ d / tr Σ | error of Σ, of its norm | its bound | error of ρ | its bound |")
    print("|---:|---:|---:|---:|---:|---:|")
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(200, width, generator=generator, dtype=torch.float64)
    for rank in ranks:
        full.reset()
        state = iada.ClassCovariance(classes, width, "low-rank", rank)
        for rows in order.split(128):
            for one in (full, state):
                one.update(inputs[rows], labels[rows])
        spread = full.variances.sum(dim=1) > 0  # a class of one sample has no covariance
        sigma, found = full.covariance[spread], state.dense().double()[spread]
        left = state.low_rank.diagonal.double()[spread]
        norm = torch.linalg.matrix_norm(sigma, 2)
        error = torch.linalg.matrix_norm(found - sigma, 2)
        forms = ((delta @ one) * delta for one in (sigma, found - sigma))
        rho, off = (form.sum(dim=2) for form in forms)
        bound = (delta.abs() @ left.sqrt().T).square().T
        columns = [
            left.sum(dim=1) / full.variances.sum(dim=1)[spread],
            error / norm,
            left.sum(dim=1) / norm,
            off.abs().amax(dim=1) / rho.mean(dim=1),
            bound.amax(dim=1) / rho.mean(dim=1),
        ]
        print(f"| {rank} | " + " | ".join(f"{float(c.amax()):.2g}" for c in columns) + " |")
    return 0


def in_parts(inputs: Tensor, labels: Tensor, parts: int) -> Tensor:
    """Finer labels: those of class c become c·parts to c·parts + parts − 1."""
    if parts == 1:
        return labels
    from sklearn.cluster import KMeans

    finer = labels * parts
    for c in labels.unique():
        rows = labels == c
        if int(rows.sum()) < 2 * parts:
            size = f"{int(rows.sum())} rows of class {int(c)}"
            raise SystemExit(f"bench.low_rank: --parts: {size} are too few for {parts} parts")
        means = KMeans(parts, n_init=1, random_state=0).fit(inputs[rows].numpy())
        finer[rows] += torch.from_numpy(means.labels_).to(finer.dtype)
    return finer


if __name__ == "__main__":
    sys.exit(main())
