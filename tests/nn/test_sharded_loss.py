"""ShardedIADALoss: classes split over processes give what one process gives."""

import pytest
import torch
import torch.distributed as dist

import iada
from tests.helpers.launch import ROOT, torchrun


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_ranks_together_give_what_one_process_gives(processes):
    """Of four ranks some have no classes; see tests/helpers/sharded_process.py."""
    output = torchrun(ROOT / "tests/helpers/sharded_process.py", processes=processes)
    assert output.count("done") == processes


@pytest.mark.parametrize(
    ("structure", "rank"),
    [("diag", None), ("full", None), ("triangle", None), ("low-rank", 2), ("low-rank", 0)],
)
def test_a_process_alone(structure, rank):
    """Without a group it is IADALoss; gradients by finite differences."""
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    features, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 3, -100, 0])
    epsilon = torch.rand(6, dtype=torch.float64)
    alone = iada.ShardedIADALoss(4, 3, None, structure=structure, rank=rank).double()
    whole = iada.IADALoss(4, 3, structure=structure, rank=rank).double()
    got = alone(features, weight, bias, labels, epsilon)
    torch.testing.assert_close(got, whole(features, weight, bias, labels, epsilon))
    alone.eval()
    inputs = [t.clone().requires_grad_() for t in (weight, bias, epsilon)]
    torch.autograd.gradcheck(lambda w, b, e: alone(features, w, b, labels, e), inputs)
    confident = alone(50 * features, 50 * weight, bias, labels)
    assert torch.isfinite(confident)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_class_that_is_ignored_and_the_other_options(reduction):
    """Rows of class 1 are ignored: it has no statistics, as in IADALoss."""
    counts = torch.tensor([5, 3, 1])
    options = {"alpha": 0.25, "beta": 2.0, "ignore_index": 1, "reduction": reduction}
    sharded = iada.ShardedIADALoss(3, 2, None, counts, **options).double()
    whole = iada.IADALoss(3, 2, counts, structure="diag", **options).double()
    features, weight = torch.randn(8, 2).double(), torch.randn(3, 2).double()
    labels, epsilon = torch.tensor([0, 1, 2, 1, 0, 2, 0, 2]), torch.rand(8).double()
    got = sharded(features, weight, None, labels, epsilon)
    torch.testing.assert_close(got, whole(features, weight, None, labels, epsilon))
    assert sharded.covariance.count.tolist() == [3, 0, 3]
    for own, expected in zip(sharded.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(own, expected)
    kept = sharded.covariance.mean.clone()
    sharded.eval()(features + 1, weight, None, labels, epsilon)
    assert torch.equal(sharded.covariance.mean, kept)


def test_what_all_rows_of_the_head_share_cancels():
    """R is that of the differences of W: 4096 in all of its rows costs no digits."""
    weight, features = torch.randn(4, 3), torch.zeros(6, 3)
    labels = torch.arange(6) % 4
    losses = []
    for common in (0.0, 2.0**12):
        criterion = iada.ShardedIADALoss(4, 3, None)
        criterion.covariance.covariance.fill_(1.0)
        criterion.eval()
        shifted = (weight * 2**8).round() / 2**8 + common  # exact in float32
        losses.append(criterion(features, shifted, None, labels))
    torch.testing.assert_close(losses[1], losses[0])


def test_a_strength_that_is_not_finite_is_told():
    criterion = iada.ShardedIADALoss(3, 2, None)
    arguments = torch.zeros(2, 2), torch.zeros(3, 2), None, torch.tensor([0, 1])
    with pytest.raises(ValueError, match="^epsilon: expected finite numbers"):
        criterion(*arguments, torch.tensor([0.0, torch.nan]))


def test_arguments_that_do_not_fit():
    for options, message in (
        ({"rows": "some"}, "^rows: expected one of 'own', 'shared'"),
        ({"structure": "banded"}, "^structure: expected one of"),
        ({"structure": "low-rank"}, "^rank: expected an int from 0"),
        ({"reduction": "none"}, "^reduction: expected one of 'mean', 'sum'"),
    ):
        with pytest.raises(ValueError, match=message):
            iada.ShardedIADALoss(3, 4, None, **options)
    with pytest.raises(ValueError, match="^num_classes: expected a whole number from 2 on"):
        iada.ShardedIADALoss(1, 4, None)


def test_a_confident_sample_keeps_its_gradient():
    """1 − p_y of 1e-20 is not 0, where p_y − 1 is."""
    weight = torch.tensor([[46.0], [0.0]], dtype=torch.float64).requires_grad_()
    criterion = iada.ShardedIADALoss(2, 1, None, alpha=0.0).double()
    loss = criterion(torch.ones(1, 1, dtype=torch.float64), weight, None, torch.tensor([0]))
    (grad,) = torch.autograd.grad(loss, weight)
    want = torch.exp(torch.tensor(-46.0, dtype=torch.float64))
    torch.testing.assert_close(grad[:, 0], torch.stack([-want, want]), rtol=1e-12, atol=0)
