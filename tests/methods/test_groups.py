"""UW and GroupDRO against their formulas, sample by sample, in float64; and whence groups come."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

import iada
from iada.methods.groups import GroupDRO, GroupDROOptions, Upweighting, UpweightingOptions
from iada.methods.options import MethodRun
from iada.utils.loading import groups_of

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, WIDTH, ROWS = 3, 5, 12
GROUPS = torch.tensor([0] * 30 + [1] * 9 + [3] * 1)  # of the training set; 2 has no sample
COUNTS = {0: 30, 1: 9, 3: 1}
KINDS = (Upweighting, GroupDRO)


def make_head(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, CLASSES, dtype=torch.float64)


def make_set(groups=GROUPS):
    generator = torch.Generator().manual_seed(1)
    inputs = 3 * torch.randn(len(GROUPS), WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(GROUPS),), generator=generator)
    return iada.TensorData(inputs, labels, groups)


def make_run(head, data=None):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    data = make_set() if data is None else data
    return MethodRun(nn.Identity(), head, optimizer, torch.ones(CLASSES), data)


def build(kind, head, data=None, **options):
    return kind(make_run(head, data), **options)


def cross_entropy(head, data, row):
    z = head.weight @ data.inputs[row] + head.bias
    return z.logsumexp(dim=0) - z[data.labels[row]]


def expected_upweighting(head, data, rows):
    """(1/n) Σ N / (G n_g) CE."""
    number = len(GROUPS)
    return sum(
        number / (len(COUNTS) * COUNTS[int(GROUPS[row])]) * cross_entropy(head, data, row)
        for row in rows
    ) / len(rows)


class Expected:
    """GroupDRO in Python numbers, of the groups that there are."""

    def __init__(self, step=0.01, adjustment=0.0):
        self.q = {g: 1 / len(COUNTS) for g in COUNTS}
        self.step, self.adjustment = step, adjustment

    def loss(self, head, data, rows):
        means = {}
        for g in COUNTS:
            own = [cross_entropy(head, data, row) for row in rows if GROUPS[row] == g]
            means[g] = sum(own) / len(own) if own else torch.zeros((), dtype=torch.float64)
        for g, mean in means.items():
            self.q[g] *= math.exp(
                self.step * (float(mean.detach()) + self.adjustment / math.sqrt(COUNTS[g]))
            )
        total = sum(self.q.values())
        self.q = {g: q / total for g, q in self.q.items()}
        return sum(self.q[g] * mean for g, mean in means.items())


def served(data, rows):
    rows = torch.tensor(rows)
    return data.inputs[rows], data.labels[rows], rows


def steps_agree(method, expected, head):
    """Four steps of SGD on the method's loss are those on `expected(head, data, rows)`."""
    data, other = make_set(), make_head()
    generator = np.random.default_rng(0)
    for step in range(4):
        rows = generator.permutation(len(GROUPS) - step)[:ROWS].tolist()  # the last one not always
        value = method.step(served(data, rows))
        want = expected(other, data, rows)
        torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=1e-12)
        other.zero_grad()
        want.backward()
        with torch.no_grad():
            for p in other.parameters():
                p -= 0.1 * p.grad
        torch.testing.assert_close(head.weight, other.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(head.bias, other.bias, rtol=1e-12, atol=1e-12)


def test_upweighting():
    head = make_head()
    steps_agree(build(Upweighting, head), expected_upweighting, head)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.5, "adjustment": 3.0}], ids=str)
def test_group_dro(options):
    head = make_head()
    method = build(GroupDRO, head, **options)
    reference = Expected(options.get("step_size", 0.01), options.get("adjustment", 0.0))
    steps_agree(method, reference.loss, head)
    q = method.log_q.exp()
    assert float(q[2]) == 0
    assert {g: float(q[g]) for g in COUNTS} == pytest.approx(reference.q, rel=1e-12)


def test_the_defaults_of_the_options_are_the_published_ones():
    run = make_run(make_head())
    dro = GroupDROOptions().build(run)
    assert (dro.step_size, bool(dro.adjustment.any()), dro.pool) == (0.01, False, None)
    dro = GroupDROOptions(group_step_size=0.5, generalization_adjustment=3.0).build(run)
    assert dro.step_size == 0.5
    assert float(dro.adjustment[1]) == pytest.approx(1.0)
    assert UpweightingOptions(balanced_batches=True).build(run).pool is not None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """Of the loss by the samples' own; q has another start each time and so is held."""
    method = build(kind, make_head())
    losses = torch.rand(ROWS, dtype=torch.float64, requires_grad=True)
    groups = GROUPS[torch.arange(ROWS) * 3]
    start = getattr(method, "log_q", torch.zeros(0)).clone()

    def loss(losses):
        if kind is GroupDRO:
            method.step_size = 0.0  # q depends on the loss, but is a constant of the gradient
            method.log_q.copy_(start)
        return method.group_loss(losses, groups)

    assert torch.autograd.gradcheck(loss, losses)


def test_no_loss_is_too_large_for_the_weights():
    method = build(GroupDRO, make_head(), step_size=1.0)
    losses = torch.tensor([1e4, 2e4, 0.0], dtype=torch.float64)
    value = method.group_loss(losses, torch.tensor([0, 1, 3]))
    assert float(value) == pytest.approx(2e4)
    assert method.log_q.exp().tolist() == pytest.approx([0, 1, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_batches(kind):
    method = build(kind, make_head(), balanced_batches=True)
    order = [list(range(20)), list(range(20, 40))] * 150
    drawn = method.begin_epoch(3, order, 70)
    assert [len(rows) for rows in drawn] == [20] * 300
    counts = torch.bincount(GROUPS[torch.tensor(drawn).flatten()], minlength=4)
    assert counts.tolist() == pytest.approx([2000, 2000, 0, 2000], rel=0.1)
    # A run that goes on at a later step draws the same.
    assert method.begin_epoch(3, order[20:], 90) == drawn[20:]
    assert build(kind, make_head()).begin_epoch(3, order, 70) is order


def test_balanced_batches_take_the_place_of_weights():
    method = build(Upweighting, make_head(), balanced_batches=True)
    losses = torch.rand(ROWS, dtype=torch.float64)
    value = method.group_loss(losses, GROUPS[torch.arange(ROWS) * 3])
    assert float(value) == pytest.approx(float(losses.mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_are_missing(kind):
    with pytest.raises(ValueError, match=r"train_set: expected an attribute `groups`.* got none; "):
        build(kind, make_head(), make_set(groups=None))
    with pytest.raises(ValueError, match=r"train_set\.groups: expected .* got -1; number"):
        build(kind, make_head(), make_set(groups=GROUPS - 1))
    method = build(kind, make_head())
    inputs, labels, index = served(make_set(), [0, 1])
    with pytest.raises(ValueError, match=r"batch: .* got no index; wrap .* iada\.Indexed"):
        method.step((inputs, labels))
    with pytest.raises(ValueError, match=r"batch index: expected places in \[0, 40\)"):
        method.step((inputs, labels, index + 39))


def test_where_groups_come_from():
    data = make_set()
    assert torch.equal(groups_of(data), GROUPS)
    assert torch.equal(groups_of(iada.Indexed(Subset(data, [39, 0]))), GROUPS[[39, 0]])
    both = ConcatDataset([Subset(data, [30]), data])
    assert groups_of(both).tolist() == [1, *GROUPS.tolist()]
    assert groups_of(ConcatDataset([data, make_set(groups=None)])) is None
    assert groups_of([]) is None
    for wrong in (GROUPS[:5], GROUPS.double()):
        with pytest.raises(ValueError, match="groups: expected an integer from 0 for each sample"):
            make_set(groups=wrong)


@pytest.mark.parametrize("options", [GroupDROOptions, UpweightingOptions])
def test_balanced_batches_are_asked_for_and_other_ones_at_each_step(options):
    order = [list(range(ROWS))] * 2
    assert options().build(make_run(make_head())).begin_epoch(0, order, 0) == order
    first, second = (
        options(balanced_batches=True).build(make_run(make_head())).begin_epoch(0, order, 0)
    )
    assert first != second
    assert options(balanced_batches=True).build(make_run(make_head())).begin_epoch(
        0, order[1:], 1
    ) == [second]


def test_the_weights_of_the_groups_are_in_the_state():
    one, other = (build(GroupDRO, make_head()) for _ in range(2))
    one.group_loss(torch.arange(3).double(), torch.tensor([0, 1, 3]))
    assert not torch.equal(one.log_q, other.log_q)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.log_q, other.log_q)
