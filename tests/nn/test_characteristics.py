"""The fifteen training characteristics, the memory behind them, and the network that sees them."""

import pytest
import torch
import torch.nn.functional as F

import iada
from iada.nn.characteristics import CHARACTERISTICS
from iada_kernels.reference import same_label_fraction


def test_perturbation_net():
    net = iada.PerturbationNet()
    shapes = [tuple(p.shape) for p in net.parameters()]
    assert shapes == [(15,), (15,), (100, 15), (100,), (1, 100), (1,)]
    epsilon = net(100 * torch.randn(8, 15))
    assert epsilon.shape == (8,)
    assert (epsilon.abs() <= 1).all()
    alone = net(torch.randn(1, 15))  # BatchNorm by itself refuses a batch of one
    assert alone.shape == (1,)
    assert torch.isfinite(alone).all()
    with pytest.raises(ValueError, match=r"characteristics: expected .*\(N, 15\)"):
        net(torch.randn(8, 14))


def test_evaluation_and_a_single_row_go_by_the_running_statistics():
    torch.manual_seed(0)
    net, values = iada.PerturbationNet(), 3 + 2 * torch.randn(8, 15)
    net(values)
    alone = [net(row[None]) for row in values]
    net.norm.eval()
    want = net.strength(net.hidden(net.norm(values)).relu()).squeeze(1).tanh()
    for got in (torch.cat(alone), net.eval()(values)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("network_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_computes_in_its_own_dtype(network_dtype, dtype):
    net, values = iada.PerturbationNet(dtype=network_dtype), torch.randn(8, 15, dtype=dtype)
    for training in (True, False):
        got, want = net.train(training)(values), net(values.to(network_dtype))
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))
        (grad,) = torch.autograd.grad(got.sum(), net.hidden.weight)
        assert grad.dtype == network_dtype


def test_what_the_network_is_not_shown():
    left = {"loss", "neighbours"}
    net = iada.PerturbationNet(without=("neighbours", "loss")).double()
    assert net.hidden.in_features == 13
    assert "columns" not in net.state_dict()
    values = torch.randn(8, 15, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(values).square().sum(), values)
    assert {CHARACTERISTICS[i] for i in range(15) if not grad[:, i].any()} == left
    with pytest.raises(ValueError, match=r"characteristics: expected .*\(N, 15\)"):
        net(values[:, :13])
    for options, words in (
        ({"without": ("los",)}, "^without: expected one of 'loss'"),
        ({"without": CHARACTERISTICS}, "^without: expected one characteristic at least"),
        ({"without": ("loss",), "num_characteristics": 3}, "^num_characteristics: expected 15"),
    ):
        with pytest.raises(ValueError, match=words):
            iada.PerturbationNet(**options)


def test_a_state_of_a_network_that_sees_other_columns_is_refused():
    """Their sizes are the same."""
    source = iada.PerturbationNet(without=["loss"])
    state = source.state_dict()
    for other in (iada.PerturbationNet(without=["margin"]), iada.PerturbationNet(14)):
        with pytest.raises(
            ValueError, match=r"^without: expected .*\[0, .* got .*\[1, 2, .*; build"
        ):
            other.load_state_dict(state)
    values = torch.randn(4, 15)
    former = {name: tensor for name, tensor in state.items() if name != "_extra_state"}
    for loaded in (state, former):
        twin = iada.PerturbationNet(without=["loss"])
        twin.load_state_dict(loaded)
        assert torch.equal(twin.eval()(values), source.eval()(values))
    assert "_extra_state" not in former
    holder = torch.nn.ModuleDict({"omega": iada.PerturbationNet(without=["loss"])})
    holder.load_state_dict({f"omega.{name}": tensor for name, tensor in former.items()})
    assert torch.equal(holder["omega"].eval()(values), source(values))


def test_characteristics_by_hand():
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    z, y = h @ w.T, torch.arange(9) % 3
    log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    memory = iada.TrainingMemory(3, num_samples=20).double()
    first_loss, first_margin = torch.rand(9).double(), torch.rand(9).double()
    index = torch.arange(9) + 5
    memory.record(first_loss, first_margin, y, index)
    memory.end_epoch()
    got = iada.characteristics(h, z, y, w, log_prior, memory, index, neighbours=2)
    assert got.shape == (9, 15)
    assert not got.requires_grad

    p = z.softmax(dim=1)
    for i in range(9):
        c, others = int(y[i]), [j for j in range(3) if j != int(y[i])]
        mine = y == c
        loss, margin = -p[i, c].log(), p[i, c] - p[i, others].max()
        cosines = F.cosine_similarity(h[i : i + 1], h)
        cosines[i] = -2
        nearest = cosines.topk(2).indices
        expected = [
            loss,
            margin,
            torch.linalg.norm(F.one_hot(y[i], 3) - p[i]),
            h[i] @ w[c] / (h[i].norm() * w[c].norm()),
            -(p[i] * p[i].log()).sum(),
            log_prior[c].exp(),
            first_loss[mine].mean(),
            w[c].norm(),
            loss - first_loss[mine].mean(),
            margin - first_margin[mine].mean(),
            p[i, c],
            first_margin[mine].mean(),
            loss - first_loss[i],
            margin - first_margin[i],
            (y[nearest] == c).double().mean(),
        ]
        torch.testing.assert_close(got[i], torch.stack(expected).double())


def test_characteristics_without_memory_or_index():
    h, w = torch.randn(4, 6), torch.randn(3, 6)
    y, prior = torch.tensor([0, 1, 2, 0]), torch.zeros(3)
    alone = iada.characteristics(h, h @ w.T, y, w, prior)
    assert (alone[:, [6, 8, 9, 11, 12, 13]] == 0).all()
    fresh = iada.characteristics(h, h @ w.T, y, w, prior, iada.TrainingMemory(3))
    assert torch.equal(alone, fresh)
    confident = iada.characteristics(h, 1e4 * (h @ w.T), y, w, prior)
    assert torch.isfinite(confident).all()


def test_a_sample_not_seen_yet_has_no_change():
    h, w, y = torch.randn(4, 6), torch.randn(3, 6), torch.tensor([0, 1, 2, 0])
    memory, index = iada.TrainingMemory(3, num_samples=9), torch.tensor([2, 3, 5, 8])
    memory.record(torch.rand(2), torch.rand(2), y[:2], index[:2])
    found = iada.characteristics(h, h @ w.T, y, w, torch.zeros(3), memory, index)
    assert (found[:2, 12:14] != 0).all()
    assert (found[2:, 12:14] == 0).all()
    none = (t[:0] for t in (h, h @ w.T, y))
    assert iada.characteristics(*none, w, torch.zeros(3), memory, index[:0]).shape == (0, 15)


def test_five_neighbours_are_asked_by_default():
    angle = torch.arange(7) * 0.1
    h = torch.stack([angle.cos(), angle.sin()], dim=1)
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1])  # four of the five nearest of the first row
    found = iada.characteristics(h, torch.zeros(7, 2), y, torch.ones(2, 2), torch.zeros(2))
    torch.testing.assert_close(found[0, 14], torch.tensor(4 / 5))


def test_a_class_not_seen_in_an_epoch_keeps_its_means():
    memory = iada.TrainingMemory(2)
    memory.record(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    memory.end_epoch()
    memory.record(torch.tensor([5.0]), torch.tensor([0.5]), torch.tensor([0]))
    memory.end_epoch()
    assert memory.class_means.tolist() == [[5.0, 0.5], [3.0, 1.0]]


def test_a_class_not_seen_yet_has_no_excess():
    memory = iada.TrainingMemory(3)
    memory.record(torch.tensor([0.5, 2.0]), torch.tensor([0.6, 0.0]), torch.tensor([0, 1]))
    memory.end_epoch()
    h, w, y = torch.randn(6, 4), torch.randn(3, 4), torch.arange(6) % 3
    values = iada.characteristics(h, h @ w.T, y, w, torch.zeros(3), memory)
    means = torch.tensor([[0.5, 0.6], [2.0, 0.0], [0.0, 0.0]])[y]
    torch.testing.assert_close(values[:, [6, 11]], means)
    excess = values[:, :2] - means
    excess[y == 2] = 0
    torch.testing.assert_close(values[:, [8, 9]], excess)


NAMED = [
    ("features", lambda t: t[None]),
    ("features", lambda t: t.long()),
    ("features", lambda t: t.tolist()),
    ("weight", lambda t: t.T),
    ("logits", lambda t: t[:, 1:]),
    ("logits", lambda t: t.to("meta")),
    ("log_prior", lambda t: t[1:]),
    ("log_prior", lambda t: None),
    ("labels", lambda t: t.float()),
    ("labels", lambda t: t - 1),
    ("labels", lambda t: t + 10**9),
    ("neighbours", lambda k: 2.0),
    ("neighbours", lambda k: 0),
    ("neighbours", lambda k: True),
    ("memory", lambda memory: iada.TrainingMemory(2, 6)),
    ("index", lambda t: t - 1),
    ("index", lambda t: t + 1),
    ("index", lambda t: t > 2),
    ("index", lambda t: t.float()),
    ("index", lambda t: t[1:]),
]


@pytest.mark.parametrize(("name", "spoil"), NAMED)
def test_arguments_that_do_not_fit_are_named(name, spoil, backend):
    h, w = torch.randn(6, 4), torch.randn(3, 4)
    call = {"features": h, "logits": h @ w.T, "labels": torch.arange(6) % 3, "weight": w}
    call |= {"log_prior": torch.zeros(3), "memory": iada.TrainingMemory(3, 6)}
    call |= {"index": torch.arange(6), "neighbours": 2}
    call[name] = spoil(call[name])
    with pytest.raises(ValueError, match=rf"(?s)^{name}: expected .+, got .+; .+"):
        iada.characteristics(**call, backend=backend)


def test_an_index_of_any_integer_dtype():
    """uint8 would be taken for a mask."""
    h, w, y = torch.randn(6, 4), torch.randn(3, 4), torch.arange(6) % 3
    found = []
    for dtype in (torch.int64, torch.uint8):
        memory, index = iada.TrainingMemory(3, 7), torch.arange(6).flip(0).to(dtype)
        memory.record(torch.arange(6.0), torch.zeros(6), y, index)
        found.append(iada.characteristics(h, h @ w.T, y, w, torch.zeros(3), memory, index))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="^index: expected places in"):
        memory.record(torch.ones(6), torch.zeros(6), y, index + 2)
    assert int(memory.class_counts.sum()) == 6, "nothing was changed"


def test_same_label_fraction_of_one_row_is_zero():
    assert same_label_fraction(torch.randn(1, 3), torch.tensor([0]), 5).tolist() == [0.0]
