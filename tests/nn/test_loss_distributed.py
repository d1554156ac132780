"""IADALoss and ClassCovariance on two processes: the result of one with the whole batch."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

import iada
from tests.helpers.launch import ROOT, torchrun

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


@pytest.mark.distributed
def test_two_processes_give_what_one_gives():
    """Under DDP and FSDP, ragged and ignored rows, errors: see tests/helpers/loss_process.py."""
    output = torchrun(ROOT / "tests/helpers/loss_process.py")
    assert "rank 0 done" in output
    assert "rank 1 done" in output


@pytest.fixture
def group():
    """The group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_of_one_changes_nothing(group):
    features, labels = torch.randn(6, 4), torch.arange(6) % 3
    weight, bias = torch.randn(3, 4), torch.randn(3)
    alone, grouped = iada.IADALoss(3, 4), iada.IADALoss(3, 4, process_group=group)
    for _ in range(2):
        got = grouped(features, weight, bias, labels)
        torch.testing.assert_close(got, alone(features, weight, bias, labels))
    assert torch.equal(grouped.covariance.covariance, alone.covariance.covariance)
    assert grouped(features[:0], weight, bias, labels[:0]) == 0


def test_copies_share_the_group_and_pickles_refuse_it(group):
    loss = iada.IADALoss(3, 4, process_group=group)
    copy.deepcopy(loss)(torch.randn(2, 4), torch.randn(3, 4), None, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="process_group: expected None in what is pickled"):
        pickle.dumps(loss)
    pickle.loads(pickle.dumps(iada.IADALoss(3, 4)))
    other = iada.IADALoss(3, 4)
    other.load_state_dict(loss.state_dict())


def losses_of_a_batch(group=None):
    """Calls of what takes a process group, by the name that it has in messages."""
    features, labels = torch.randn(6, 4), torch.arange(6) % 3
    backbone, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    loss = iada.IADALoss(3, 4, process_group=group)
    state = iada.ClassCovariance(3, 4, process_group=group)
    meta = iada.MetaIADA(backbone, head, optimizer, torch.ones(3), process_group=group)
    return {
        "IADALoss": lambda: loss(features, head.weight, head.bias, labels),
        "ClassCovariance": lambda: state.update(features, labels),
        "method": lambda: meta.step((features, labels), (features, labels)),
    }


def test_a_group_that_was_asked_for_too_early_is_told(recwarn):
    """group.WORLD is None before init_process_group(), as where Lightning builds a module."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    calls = losses_of_a_batch(dist.group.WORLD)
    for call in calls.values():
        call()
    assert not [w for w in recwarn if "process_group" in str(w.message)]
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    try:
        for name, call in calls.items():
            recwarn.clear()
            call()
            call()
            (told,) = [w for w in recwarn if "process_group" in str(w.message)]
            assert str(told.message).startswith(f"{name}: expected process_group=torch.dist")
            assert "has 2 processes, got None" in str(told.message)
            assert told.filename == __file__
    finally:
        dist.destroy_process_group()


def test_a_group_that_was_destroyed_is_told(group):
    state = iada.ClassCovariance(3, 4, process_group=group)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="process_group: expected one that is alive"):
        state.update(torch.randn(2, 4), torch.tensor([0, 1]))


def test_what_is_no_group_is_told():
    # What new_group() gives to processes that are not among its members.
    for wrong in (dist.GroupMember.NON_GROUP_MEMBER, "gloo", 2):
        with pytest.raises(ValueError, match="^process_group: expected a torch.distributed"):
            iada.IADALoss(3, 4, process_group=wrong)
