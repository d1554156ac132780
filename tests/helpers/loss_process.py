"""What tests/nn/test_loss_distributed.py launches with torchrun: each of two ranks runs all of it.

Each rank also computes, alone, what one process gives with the whole batch.
"""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from torch.nn.parallel import DistributedDataParallel

import iada
from iada.utils.distributed import current_group, gather_objects, launched_group, rank_of
from tests.helpers.training import make_data

CLASSES, WIDTH, IGNORED = 3, 4, 7
# Rows of rank 0 and rank 1 in each step; a rank may have none, or only ignored ones.
PARTS = ((6, 3), (1, 8), (5, 0), (4, 2))


class Net(nn.Module):
    """A backbone and a head; with a criterion, forward gives the loss."""

    def __init__(self, criterion=None):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(5, WIDTH, dtype=torch.float64), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        self.criterion = criterion

    def forward(self, inputs, labels=None):
        features = self.backbone(inputs)
        if self.criterion is None:
            return features
        return self.criterion(features, self.head.weight, self.head.bias, labels)


def batches():
    """Whole batches, and the slices of both ranks."""
    generator = torch.Generator().manual_seed(0)
    for step, (first, second) in enumerate(PARTS):
        count = first + second
        labels = torch.arange(count) % CLASSES
        labels[1::4] = IGNORED
        if step == 3:
            labels[first:] = IGNORED
        inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        yield inputs, labels, (slice(0, first), slice(first, count))


def criterion(group, **options):
    counts = torch.tensor([10, 5, 2])
    found = iada.IADALoss(
        CLASSES, WIDTH, counts, ignore_index=IGNORED, process_group=group, **options
    )
    return found.double()


def gradients(net):
    grads = [p.grad for p in net.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def alone(**options):
    """(loss, gradients, criterion) of each step by one process."""
    net = Net()
    loss_of = criterion(None, **options)
    for inputs, labels, _ in batches():
        net.zero_grad()
        loss = loss_of(net(inputs), net.head.weight, net.head.bias, labels)
        loss.backward()
        yield loss.detach(), gradients(net), loss_of


def check_step(net, loss, loss_of, want):
    """The mean over the ranks is the loss; averaged gradients and statistics are one process's."""
    want_loss, want_gradients, want_of = want
    losses = gather_objects(loss.detach(), current_group())
    torch.testing.assert_close(torch.stack(losses).mean(), want_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(net), want_gradients, rtol=1e-12, atol=1e-12)
    buffers, want_buffers = loss_of.state_dict(), want_of.state_dict()
    assert buffers.keys() == want_buffers.keys()
    for name, buffer in want_buffers.items():
        # The backbone's features of a part round otherwise than those of the whole batch; an
        # eigenvalue that is 0 but for rounding leaves its direction to it, hence Σ itself below.
        if name not in ("log_prior", "covariance.covariance"):
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-14)
    sigma, want_sigma = loss_of.covariance.dense(), want_of.covariance.dense()
    torch.testing.assert_close(sigma, want_sigma, rtol=1e-12, atol=1e-14)
    first, second = gather_objects(buffers, current_group())
    assert all(torch.equal(first[name], second[name]) for name in first), "ranks differ"


def check_ddp(group, inside, **options):
    """The criterion as a part of the module that DDP wraps, or beside it."""
    loss_of = criterion(group, **options)
    net = Net(loss_of if inside else None)
    ddp = DistributedDataParallel(net, broadcast_buffers=True)
    for (inputs, labels, parts), want in zip(batches(), alone(**options), strict=True):
        own = parts[rank_of(group)]
        net.zero_grad()
        if inside:
            loss = ddp(inputs[own], labels[own])
        else:
            features = ddp(inputs[own])
            loss = loss_of(features, net.head.weight, net.head.bias, labels[own])
        loss.backward()
        check_step(net, loss, loss_of, want)


def check_rows(group):
    """reduction="none": each row's own loss, not scaled."""
    loss_of, whole_of = criterion(group, reduction="none"), criterion(None, reduction="none")
    net = Net()
    for inputs, labels, parts in batches():
        own = parts[rank_of(group)]
        features = net(inputs).detach()
        loss = loss_of(features[own], net.head.weight, net.head.bias, labels[own])
        whole = whole_of(features, net.head.weight, net.head.bias, labels)
        torch.testing.assert_close(loss, whole[own], rtol=1e-12, atol=1e-12)


def check_covariance(group, structure, dtype):
    """All rows, in the order of ranks: the same bits as one process with all of them."""
    rank = 2 if structure == "low-rank" else None
    state = iada.ClassCovariance(CLASSES, WIDTH, structure, rank, process_group=group)
    whole = iada.ClassCovariance(CLASSES, WIDTH, structure, rank)
    for inputs, labels, parts in batches():
        features = inputs[:, :WIDTH].to(dtype)
        own = parts[rank_of(group)]
        state.update(features[own], labels[own], ignore_index=IGNORED)
        whole.update(features, labels, ignore_index=IGNORED)
        for name, buffer in whole.state_dict().items():
            assert torch.equal(state.state_dict()[name], buffer), name
    state.update(features[:0], labels[:0])  # nobody has a row
    assert torch.equal(state.covariance, whole.covariance)


def check_errors(group):
    """What is wrong with one rank's arguments ends the call on all, with the state as it was."""
    loss_of, net = criterion(group), Net()
    inputs, labels, parts = next(batches())
    own = parts[rank_of(group)]
    features, labels = net(inputs)[own].detach(), labels[own].clone()
    weight, bias = net.head.weight, net.head.bias
    bad_features, bad_labels = features.clone(), labels.clone()
    bad_features[0, 0], bad_labels[0] = torch.nan, 99
    probabilities = torch.full((len(labels), CLASSES), 1 / CLASSES).double()
    wrong = {
        "labels: expected class": (features, weight, bias, bad_labels),
        "features: expected finite": (bad_features, weight, bias, labels),
        "weight: expected": (features, weight[:, 1:], bias, labels),
        "row_weight: expected": (features, weight, bias, labels, None, -features[:, 0].abs()),
        "labels: expected class indices where": (features, weight, bias, probabilities),
    }
    for message, arguments in wrong.items():
        right = (features, weight, bias, labels)
        of_another = "process_group: expected arguments that fit on every rank.* on rank 1"
        first = rank_of(group) == 0
        with pytest.raises(ValueError, match=f"^{of_another if first else message}"):
            loss_of(*(right if first else arguments))
        assert not loss_of.covariance.count.any()
    for spoilt in ((bad_features, labels), (features, bad_labels), (features[:, 1:], labels)):
        given = (features, labels) if first else spoilt
        with pytest.raises(ValueError, match="^process_group" if first else "^features|^labels"):
            loss_of.covariance.update(*given, ignore_index=IGNORED)
        assert not loss_of.covariance.count.any()
    loss_of(features, weight, bias, labels)  # and on it goes


def check_evaluation(group):
    """In evaluation mode a rank may be on its own."""
    loss_of, net = criterion(group).eval(), Net()
    inputs, labels, _ = next(batches())
    if rank_of(group) == 1:
        got = loss_of(net(inputs), net.head.weight, net.head.bias, labels)
        want = criterion(None).eval()(net(inputs), net.head.weight, net.head.bias, labels)
        assert torch.equal(got, want)


def check_fsdp(group, inside):
    """The loss in the sharded module's forward, or of a DTensor head made whole."""
    loss_of = criterion(group)
    net = Net()
    if inside:
        net.criterion = loss_of
        fully_shard(net)
    else:
        fully_shard(net.backbone)
        fully_shard(net.head)
    for (inputs, labels, parts), want in zip(batches(), alone(), strict=True):
        own = parts[rank_of(group)]
        net.zero_grad()
        if inside:
            loss = net(inputs[own], labels[own])
        else:
            weight, bias = (
                p.full_tensor(grad_placements=[Partial("avg")])
                for p in (net.head.weight, net.head.bias)
            )
            loss = loss_of(net.backbone(inputs[own]), weight, bias, labels[own])
        loss.backward()
        check_step(net, loss, loss_of, want)
    if inside:
        return
    for given in (loss_of, criterion(None)):
        with pytest.raises(ValueError, match=r"^weight: .* a DTensor.*weight\.full_tensor\("):
            given(torch.randn(2, WIDTH).double(), net.head.weight, net.head.bias, labels[:2])
    config = iada.TrainerConfig(method="ce", epochs=1, ce_epochs=0, batch_size=8)
    for backbone, head, name in (
        (Net().backbone, net.head, "head"),
        (net.backbone, Net().head, "backbone"),
    ):
        optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.1)
        message = f"^{name}: expected a plain module, got one sharded into DTensors; leave out"
        with pytest.raises(ValueError, match=message):
            iada.Trainer(backbone, head, make_data(), None, config)
        with pytest.raises(ValueError, match=message):
            iada.MetaIADA(backbone, head, optimizer, torch.ones(CLASSES))


def check_engine(group):
    """A covariance with a process group of its own, given to MetaIADA, takes each row in once."""
    states = []
    for own_group in (None, group):
        net = Net()
        covariance = iada.ClassCovariance(CLASSES, WIDTH, process_group=own_group).double()
        meta = iada.MetaIADA(
            net.backbone,
            net.head,
            torch.optim.SGD(net.parameters(), 0.1),
            torch.ones(CLASSES),
            covariance=covariance,
            process_group=group,
        )
        inputs, labels, parts = next(batches())
        labels = labels.clamp(max=CLASSES - 1)
        batch = inputs[parts[rank_of(group)]], labels[parts[rank_of(group)]]
        meta.step(batch, batch)
        assert int(covariance.count.sum()) == len(labels)
        states.append(covariance.covariance)
    assert torch.equal(*states)


def main():
    group = current_group()
    for structure in ("full", "diag", "low-rank"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            check_covariance(group, structure, dtype)
    for reduction in ("mean", "sum"):
        for inside in (True, False):
            check_ddp(group, inside, reduction=reduction)
    weighted = {"class_weight": torch.tensor([0.5, 2.0, 1.0]), "label_smoothing": 0.0}
    check_ddp(group, inside=True, structure="diag", backend="torch", **weighted)
    check_ddp(group, inside=True, label_smoothing=0.1, backend="torch")
    check_ddp(group, inside=True, structure="low-rank", rank=WIDTH)
    check_ddp(group, inside=True, shrinkage=3.0)
    check_rows(group)
    check_errors(group)
    check_evaluation(group)
    for inside in (True, False):
        check_fsdp(group, inside)
    check_engine(group)
    print(f"rank {rank_of(group)} done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launched_group():
        main()
