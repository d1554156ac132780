"""What tests/nn/test_sharded_loss.py launches with torchrun, on two ranks or four.

Each rank also computes, alone, what one process gives with the whole batch.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import iada
from iada.nn.class_covariance import STRUCTURES
from iada.utils.distributed import launched_group, rank_of, size_of

WIDTH, IGNORED = 5, 90
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def head_of(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    weight = torch.randn(num_classes, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    return weight, bias, torch.arange(num_classes) + 1


def batches(num_classes, ranks):
    """Whole batches, and the slice of each rank, of which some have no row."""
    generator = torch.Generator().manual_seed(0)
    for parts in ([3 + r for r in range(ranks)], [5] + [0] * (ranks - 1), [1] * ranks):
        count = sum(parts)
        features = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        labels = torch.randint(num_classes, (count,), generator=generator)
        labels[1::4] = IGNORED
        epsilon = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
        ends = list(itertools.accumulate(parts))
        yield features, labels, epsilon, [slice(e - p, e) for e, p in zip(ends, parts, strict=True)]


def gradients(criterion, features, weight, bias, labels, epsilon):
    """The loss, and its gradients by all four (by epsilon if given)."""
    inputs = [t for t in (features, weight, bias, epsilon) if t is not None]
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = criterion(*leaves[:3], labels, *leaves[3:])
    return loss.detach(), torch.autograd.grad(loss, leaves)


def check_one_process(group, num_classes, structure, rows, reduction, with_epsilon):
    """Loss, gradients and statistics are those of one process with all classes and rows."""
    weight, bias, counts = head_of(num_classes)
    options = {"structure": structure, "reduction": reduction, "ignore_index": IGNORED}
    options["rank"] = 2 if structure == "low-rank" else None
    whole = iada.IADALoss(num_classes, WIDTH, counts, **options).double()
    criterion = iada.ShardedIADALoss(num_classes, WIDTH, group, counts, rows=rows, **options)
    criterion = criterion.double()
    classes = slice(criterion.classes.start, criterion.classes.stop)
    for features, labels, epsilon, parts in batches(num_classes, size_of(group)):
        epsilon = epsilon if with_epsilon else None
        part, scale = (parts[rank_of(group)], size_of(group)) if rows == "own" else (slice(None), 1)
        want, want_grads = gradients(whole, features, weight, bias, labels, epsilon)
        own_epsilon = None if epsilon is None else epsilon[part]
        head = weight[classes], bias[classes]
        got, grads = gradients(criterion, features[part], *head, labels[part], own_epsilon)
        torch.testing.assert_close(got, want, **CLOSE)
        cuts = (part, classes, classes, part)
        for grad, whole_grad, cut, times in zip(
            grads, want_grads, cuts, (scale, 1, 1, scale), strict=False
        ):
            torch.testing.assert_close(grad, times * whole_grad[cut], **CLOSE)
        if criterion.classes:
            for name, buffer in criterion.covariance.named_buffers():
                want_buffer = whole.covariance.get_buffer(name)[classes]
                torch.testing.assert_close(buffer, want_buffer, **CLOSE)


def check_two_losses_before_a_backward(group):
    """Σ that streams on is lent: the first loss's gradient is that of its own Σ."""
    weight, _, counts = head_of(7)
    features, labels, _, _ = next(batches(7, 2))
    totals = []
    for sharded in (False, True):
        if sharded:
            options = {"structure": "full", "rows": "shared", "ignore_index": IGNORED}
            criterion = iada.ShardedIADALoss(7, WIDTH, group, counts, **options).double()
            own = weight[criterion.classes.start : criterion.classes.stop]
        else:
            criterion = iada.IADALoss(7, WIDTH, counts, ignore_index=IGNORED).double()
            own = weight
        own = own.clone().requires_grad_()
        losses = [criterion(features * k, own, None, labels) for k in (1.0, 3.0)]
        totals.append(torch.autograd.grad(losses[0] + losses[1], own)[0])
    part = slice(criterion.classes.start, criterion.classes.stop)
    torch.testing.assert_close(totals[1], totals[0][part], **CLOSE)


def check_half_precision(group):
    """bfloat16 features and head: everything between is float32, as in one process."""
    weight, bias, counts = (t if t.dtype == torch.int64 else t.bfloat16() for t in head_of(7))
    features, labels, epsilon, _ = next(batches(7, 2))
    whole = iada.IADALoss(7, WIDTH, counts, structure="diag", ignore_index=IGNORED)
    options = {"rows": "shared", "ignore_index": IGNORED}
    criterion = iada.ShardedIADALoss(7, WIDTH, group, counts, **options)
    classes = slice(criterion.classes.start, criterion.classes.stop)
    assert criterion.log_prior.untyped_storage().nbytes() == 4 * len(criterion.classes)
    batch = labels, epsilon.float()
    want, want_grads = gradients(whole, features.bfloat16(), weight, bias, *batch)
    head = weight[classes], bias[classes]
    got, grads = gradients(criterion, features.bfloat16(), *head, *batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for grad, whole_grad, cut in zip(
        grads, want_grads, (slice(None), classes, classes), strict=False
    ):
        torch.testing.assert_close(grad, whole_grad[cut])  # a rounding of bfloat16 may differ


def check_sharded_heads(group):
    """A head that DTensor or FSDP2 split is taken as it is; another placement is told."""
    mesh = init_device_mesh("cpu", (size_of(group),))
    weight, bias, counts = head_of(7)
    features, labels, epsilon, _ = next(batches(7, 2))
    whole = iada.IADALoss(7, WIDTH, counts, structure="diag", ignore_index=IGNORED).double()
    _, want = gradients(whole, features, weight, bias, labels, epsilon)

    def criterion():
        options = {"rows": "shared", "ignore_index": IGNORED}
        return iada.ShardedIADALoss(7, WIDTH, group, counts, **options).double()

    head = nn.Linear(WIDTH, 7, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    fully_shard(head, mesh=mesh)
    split = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias)]
    for w, b in ((head.weight, head.bias), split):
        loss = criterion()(features, w, b, labels, epsilon)
        loss.backward()
        for parameter, grad in ((w, want[1]), (b, want[2])):
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), grad, **CLOSE)
    copies = distribute_tensor(weight, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"^weight: expected a DTensor sharded along its classes"):
        criterion()(features, copies, None, labels)


def check_errors(group):
    """An error of one rank is raised on all, and none waits for ever."""
    criterion = iada.ShardedIADALoss(7, WIDTH, group).double()
    weight = head_of(7)[0][criterion.classes.start : criterion.classes.stop]
    features, labels = torch.ones(2, WIDTH, dtype=torch.float64), torch.tensor([0, 6])
    last = rank_of(group) == size_of(group) - 1
    with pytest.raises(ValueError, match=r"^labels: .* got 7 at row 0" if last else "an error on"):
        criterion(features, weight, None, labels + 7 if last else labels)
    with pytest.raises(ValueError, match=r"^weight: expected .*\(\d, 5\)" if last else "an error"):
        criterion(features, weight[:-1] if last else weight, None, labels)
    assert not criterion.covariance.count.any(), "nothing was changed"


def main():
    with launched_group():
        group = dist.group.WORLD
        for structure, rows in itertools.product(STRUCTURES, iada.nn.sharded_loss.ROWS):
            check_one_process(group, 7, structure, rows, "mean", with_epsilon=True)
        check_one_process(group, 7, "full", "own", "sum", with_epsilon=False)
        check_one_process(group, 2, "diag", "own", "mean", with_epsilon=True)
        check_one_process(group, 2, "full", "own", "mean", with_epsilon=False)
        check_two_losses_before_a_backward(group)
        check_half_precision(group)
        check_sharded_heads(group)
        check_errors(group)
        print(f"rank {rank_of(group)} done", flush=True)


if __name__ == "__main__":
    main()
