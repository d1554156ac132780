"""RISDA against its formula, sample by sample, in float64."""

import copy

import pytest
import torch
from torch import nn

import iada
from iada.methods.options import MethodRun
from iada.methods.risda import RISDAOptions, tail_classes
from iada.utils.evaluate import by_batch
from tests.helpers.largest_output import LargestOutput
from tests.helpers.training import differences, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, WIDTH = 4, 5
COUNTS = torch.tensor([30, 6, 12, 0])  # of the training set: classes 1 and 3 are the tail
OPTIONS = {"covariance_scale": 3.0, "prototype_scale": 0.7, "head_share": 0.5, "class_beta": 0.9}
EPOCH, EPOCHS = 6, 8


def make_set():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(CLASSES).repeat_interleave(COUNTS)
    inputs = torch.randn(len(labels), WIDTH, generator=generator, dtype=torch.float64)
    return iada.TensorData(inputs + torch.eye(CLASSES, WIDTH)[labels], labels)


def build(backbone=None, begin=True, **options):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    backbone = nn.Identity() if backbone is None else backbone
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    run = MethodRun(backbone, head, optimizer, COUNTS, make_set(), epochs=EPOCHS, ce_epochs=6)
    method = RISDAOptions(**{**OPTIONS, **options}).build(run)
    if begin:
        method.prepare()
        method.begin_epoch(EPOCH, [[0]], 0)
    return method


def relations(head, data):
    """K, a row after the other; a class without samples is taken for itself."""
    shares = torch.eye(CLASSES, dtype=torch.float64)
    for c in range(CLASSES):
        own = data.inputs[data.labels == c]
        if len(own):
            taken = [int((head.weight @ h + head.bias).argmax()) for h in own]
            for k in range(CLASSES):
                shares[c, k] = taken.count(k) / len(own)
    return shares


def statistics(features, labels):
    """μ and Σ, zeros for a class without samples."""
    mean = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    sigma = torch.zeros(CLASSES, WIDTH, WIDTH, dtype=torch.float64)
    for c in range(CLASSES):
        own = features[labels == c]
        if len(own):
            mean[c] = own.mean(dim=0)
            sigma[c] = (own - mean[c]).T @ (own - mean[c]) / len(own)
    return mean, sigma


def effective_weights(beta):
    raw = [(1 - beta) / (1 - beta ** max(1, n)) for n in COUNTS.tolist()]
    return [CLASSES * r / sum(raw) for r in raw]


def expected_loss(features, weight, bias, labels, shares, displacement, sigma):
    """The formula of the module, written out; sigma after the batch was taken in."""
    share = EPOCH / EPOCHS
    omega = effective_weights(OPTIONS["class_beta"])
    total = norm = 0.0
    for h, y in zip(features, labels.tolist(), strict=True):
        own = sigma[y]
        if y in (1, 3):
            own = sum(shares[y, k] * sigma[k] for k in range(CLASSES))
        moved = h + share * OPTIONS["prototype_scale"] * displacement[y]
        z = []
        for j in range(CLASSES):
            apart = weight[j] - weight[y]
            square = 0.5 * share * OPTIONS["covariance_scale"] * (apart @ own @ apart)
            z.append(weight[j] @ moved + bias[j] + square)
        z = torch.stack(z)
        total = total + omega[y] * (z.logsumexp(dim=0) - z[y])
        norm = norm + omega[y]
    return total / norm


def make_batch(rows=16, seed=2):
    generator = torch.Generator().manual_seed(seed)
    features = 2 * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return features, torch.randint(CLASSES, (rows,), generator=generator)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_loss_and_gradients(structure):
    method, data = build(structure=structure), make_set()
    shares = relations(method.head, data)
    assert (shares.diagonal()[:3] < 1).all()  # else nothing would be borrowed
    mean, _ = statistics(data.inputs, data.labels)
    features, labels = make_batch()
    _, sigma = statistics(torch.cat([data.inputs, features]), torch.cat([data.labels, labels]))
    if structure == "diag":
        sigma = torch.diag_embed(sigma.diagonal(dim1=1, dim2=2))
    found = []
    tensors = [features, method.head.weight.detach(), method.head.bias.detach()]
    terms = shares, shares @ mean - mean, sigma
    for loss in (method.loss, lambda *given: expected_loss(*given, *terms)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        value = loss(*leaves, labels)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_a_step_is_one_of_the_optimizer_on_the_loss():
    method, other = build(), build()
    batch = make_batch()
    value = method.step(batch)
    loss = other.loss(batch[0], other.head.weight, other.head.bias, batch[1])
    torch.testing.assert_close(value, loss.detach())
    loss.backward()
    torch.testing.assert_close(method.head.weight, other.head.weight - 0.1 * other.head.weight.grad)
    assert torch.equal(method.covariance.covariance, other.covariance.covariance)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_gradcheck(structure):
    method = build(structure=structure)
    features, labels = make_batch(6)

    method.covariance.update_gathered = lambda *_: None  # Σ is a constant of the gradient

    def loss(*leaves):
        return method.loss(*leaves, labels)

    leaves = [features, method.head.weight.detach(), method.head.bias.detach()]
    assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in leaves])


def test_scales_follow_the_run():
    """By the share of all epochs that is over, with nothing prepared anew."""
    method = build()
    before = method.displacement.clone()
    method.head.weight.data.neg_()
    for epoch in (6, 7):
        method.prepare()
        method.begin_epoch(epoch, [[0]], 0)
        assert method.alpha == pytest.approx(3.0 * epoch / 8)
        assert method.shift == pytest.approx(0.7 * epoch / 8)
    assert torch.equal(method.displacement, before)


def test_all_classes_a_head_and_no_prototypes_are_class_balanced_isda():
    method = build(head_share=1.0, prototype_scale=0.0)
    assert torch.equal(method.mixing, torch.eye(CLASSES, dtype=torch.float64))
    features, labels = make_batch()
    sigma = iada.ClassCovariance(CLASSES, WIDTH).double()
    for part in (make_set().inputs, make_set().labels), (features, labels):
        sigma.update(*part)
    weight, bias = method.head.weight, method.head.bias
    weights = method.class_weights
    want = iada.fused_loss(
        features, weight, bias, labels, covariance=sigma, alpha=2.25, class_weight=weights
    )
    torch.testing.assert_close(method.loss(features, weight, bias, labels), want)


def test_the_pass_between_the_stages_leaves_the_network_alone():
    backbone = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)).double()
    backbone[0].running_mean.fill_(0.5)
    method = build(backbone, begin=False)
    state, random = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    order = [[3, 1], [2]]
    method.prepare()
    assert method.begin_epoch(EPOCH, order, 7) is order
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(module.training for module in backbone.modules())
    data = make_set()
    mean, _ = statistics(backbone.eval()(data.inputs).detach(), data.labels)
    torch.testing.assert_close(method.covariance.mean, mean)


def test_its_state_is_whole():
    method = build()
    method.step(make_batch())
    other = build()
    other.prepared = False
    other.mixing.zero_()
    other.load_state_dict(method.state_dict())
    assert (other.prepared, other.alpha, other.shift) == (True, method.alpha, method.shift)
    for name in ("mixing", "displacement"):
        assert torch.equal(getattr(other, name), getattr(method, name))
    assert torch.equal(other.covariance.mean, method.covariance.mean)


def test_the_pass_is_loaded_as_the_training_is():
    """By the trainer's workers, which change nothing."""
    found = []
    for workers in (0, 1):
        trainer = make_trainer(method="risda", epochs=3, num_workers=workers)
        assert trainer.method.num_workers == workers
        trainer.fit()
        found.append(trainer.state_dict())
    assert differences(*found) == []


def test_the_pass_draws_by_the_seed_of_the_run():
    trainer = make_trainer(method="risda", seed=5)
    method = trainer.method
    method.prepare()

    def means(seed):
        given = list(by_batch(trainer.backbone, trainer.head, trainer.train_set, seed=seed))
        features, labels = (torch.cat([b[place] for b in given]).double() for place in (0, 2))
        return torch.stack([features[labels == c].mean(dim=0) for c in range(3)])

    torch.testing.assert_close(method.covariance.mean.double(), means(5), rtol=1e-5, atol=1e-5)
    assert (means(0) - means(5)).abs().max() > 1e-3


def test_all_processes_have_the_first_one_s_statistics(monkeypatch):
    sent = []
    monkeypatch.setattr("iada.methods.risda.broadcast", lambda tensors, group: sent.extend(tensors))
    method = build()
    wanted = [method.mixing, method.displacement, *method.covariance.buffers()]
    assert {tensor.data_ptr() for tensor in sent} == {tensor.data_ptr() for tensor in wanted}


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_nothing_of_rows_by_classes_by_width_is_built(structure):
    rows, classes, width = 512, 24, 48
    head = nn.Linear(width, classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    data = iada.TensorData(torch.randn(60, width), torch.arange(60) % classes)
    run = MethodRun(nn.Identity(), head, optimizer, torch.ones(classes), data, epochs=2)
    method = RISDAOptions(structure=structure).build(run)
    features, labels = torch.randn(rows, width), torch.arange(rows) % classes
    with LargestOutput() as watch:
        method.prepare()
        method.begin_epoch(1, [[0]], 0)
        method.step((features, labels))
    assert watch.numel <= classes * width * max(classes, width), watch.maker


def test_the_largest_classes_are_the_head():
    counts = torch.tensor([5, 100, 5, 60, 5])
    assert tail_classes(counts, 0.4).tolist() == [True, False, True, False, True]
    assert tail_classes(counts, 0.6).tolist() == [False, False, True, False, True]
    assert tail_classes(counts, 0.0).all()


def test_a_low_rank_covariance_is_not_mixed():
    with pytest.raises(
        ValueError, match="structure: expected one of 'full', 'diag', got 'low-rank'"
    ):
        iada.TrainerConfig.from_settings({"method": "risda", "structure": "low-rank"})


def test_of_equal_classes_the_first_are_larger_and_shares_are_rounded():
    assert tail_classes(torch.full((50,), 5.0), 0.2).tolist() == [False] * 10 + [True] * 40
    assert tail_classes(torch.arange(7, 0, -1), 0.25).tolist() == [False] * 2 + [True] * 5


def test_a_finished_run_shows_the_terms_of_its_last_epoch():
    one, other = build(), build()
    one.begin_epoch(9, [], 0)
    other.load_state_dict(one.state_dict())
    assert (other.alpha, other.shift) == (one.alpha, one.shift)
    assert one.alpha != build().alpha
    assert one.shift != build().shift
