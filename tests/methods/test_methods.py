"""Each baseline's loss and gradients against its formula, written from the paper, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iada
from iada.methods.afr import (
    AFR,
    adaptive_thresholds,
    fit_categories,
    minority_mask,
    targeted_attack,
)
from iada.methods.class_balanced import ClassBalanced
from iada.methods.cmo import CMO, ForegroundPool, Paste
from iada.methods.drw import DeferredReweighting
from iada.methods.ldam import LDAM, CosineLinear
from iada.methods.options import MethodRun
from iada.nn.priors import class_balanced_weights

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = torch.tensor([500, 40, 3, 0])
CLASSES, WIDTH, ROWS = 4, 6, 16


def make_head(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, CLASSES, bias=bias, dtype=torch.float64)


def make_rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = 3 * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return features, torch.randint(CLASSES, (ROWS,), generator=generator)


def build(kind, head, **options):
    """The method over a backbone that hands its inputs through."""
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    return kind(MethodRun(nn.Identity(), head, optimizer, COUNTS), **options)


def agrees(method, head, expected, tolerance=1e-12):
    """The method's loss and its gradients are those of `expected(features, weight, bias, y)`."""
    features, labels = make_rows()
    tensors = [features, head.weight.detach(), head.bias.detach()]
    found = []
    for loss in (method.loss, expected):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        value = loss(*leaves, labels)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        found.append(
            [
                value,
                *[
                    torch.zeros_like(t) if g is None else g
                    for g, t in zip(grads, tensors, strict=True)
                ],
            ]
        )
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)
    return found[1]


def effective_weights(beta):
    """One class after the other, in Python numbers."""
    raw = [(1 - beta) / (1 - beta ** max(1, n)) for n in COUNTS.tolist()]
    return [len(raw) * r / sum(raw) for r in raw]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_class_balanced_weights(beta):
    weights = class_balanced_weights(COUNTS, beta)
    assert weights.tolist() == pytest.approx(effective_weights(beta), rel=1e-9)
    assert float(weights.sum()) == pytest.approx(CLASSES)
    assert beta or weights.tolist() == [1.0] * CLASSES


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_class_balanced_focal(gamma):
    """(1/n) Σ ω_y (1 − p_y)^γ (−log p_y), p a softmax."""
    omega = torch.tensor(effective_weights(0.99), dtype=torch.float64)

    def expected(features, weight, bias, labels):
        z = features @ weight.T + bias
        p = z.exp() / z.exp().sum(dim=1, keepdim=True)
        own = p[torch.arange(ROWS), labels]
        return (
            sum(omega[y] * (1 - q) ** gamma * -q.log() for q, y in zip(own, labels, strict=True))
            / ROWS
        )

    head = make_head()
    agrees(build(ClassBalanced, head, class_beta=0.99, focal_gamma=gamma), head, expected)


def test_focal_of_a_certain_sample_has_finite_gradients():
    head = make_head()
    method = build(ClassBalanced, head, focal_gamma=0.5)
    features = torch.full((1, WIDTH), 1e4, dtype=torch.float64, requires_grad=True)
    label = head(features).argmax(dim=1)
    (grad,) = torch.autograd.grad(method.loss(features, head.weight, head.bias, label), features)
    assert torch.isfinite(grad).all()


def agrees_when_deferred(kind, epoch, expected):
    """`agrees` in this epoch, of a method that weighs its classes from epoch 4 on."""
    head = make_head()
    method = build(kind, head, reweight_epoch=4)
    order = [[0, 1], [2]]
    assert method.begin_epoch(epoch, order, 7) is order
    agrees(method, head, expected, tolerance=1e-10)


@pytest.mark.parametrize("epoch", [3, 4])
def test_ldam(epoch):
    """−log e^{s(cos_y − Δ_y)} / (e^{s(cos_y − Δ_y)} + Σ_{j≠y} e^{s cos_j}), later weighted."""
    margins = torch.tensor([max(1, n) ** -0.25 for n in COUNTS.tolist()], dtype=torch.float64)
    margins *= 0.5 / margins.max()
    omega = torch.tensor(effective_weights(0.9999 if epoch >= 4 else 0.0), dtype=torch.float64)

    def expected(features, weight, bias, labels):
        total = norm = 0.0
        for h, y in zip(features, labels, strict=True):
            cosine = torch.stack([h @ w / (h.norm() * w.norm()) for w in weight])
            own = torch.exp(30 * (cosine[y] - margins[y]))
            rest = sum(torch.exp(30 * cosine[j]) for j in range(CLASSES) if j != y)
            total = total - omega[y] * torch.log(own / (own + rest))
            norm = norm + omega[y]
        return total / norm

    agrees_when_deferred(LDAM, epoch, expected)


@pytest.mark.parametrize("epoch", [3, 4])
def test_ce_drw(epoch):
    weights = torch.tensor(effective_weights(0.9999 if epoch >= 4 else 0.0), dtype=torch.float64)

    def expected(features, weight, bias, labels):
        total = norm = 0.0
        for h, y in zip(features, labels, strict=True):
            z = weight @ h + bias
            total = total + weights[y] * (z.logsumexp(dim=0) - z[y])
            norm = norm + weights[y]
        return total / norm

    agrees_when_deferred(DeferredReweighting, epoch, expected)


def test_ldam_is_evaluated_by_cosines():
    head = make_head()
    head.weight.data[0] *= 100  # a long row wins every product, but no cosine by it
    head.bias.data[1] = 1e6
    data = iada.TensorData(*make_rows())
    cosine = F.normalize(data.inputs) @ F.normalize(head.weight).T
    settings = {"method": "ldam-drw", "epochs": 1, "ce_epochs": 0}
    trainer = iada.Trainer(
        nn.Identity(),
        head,
        data,
        None,
        iada.TrainerConfig.from_settings(settings),
        class_counts=COUNTS,
    )
    assert isinstance(trainer.method.head, CosineLinear)
    torch.testing.assert_close(trainer.method.head(data.inputs), 30 * cosine)
    torch.testing.assert_close(trainer.outputs(data).logits, 30 * cosine)
    right = (cosine.argmax(dim=1) == data.labels).double()
    for c, share in enumerate(trainer.class_accuracy(data)):
        own = right[data.labels == c]
        assert float(share) == float(own.mean()) if len(own) else math.isnan(share)
    before = head.bias.clone()
    trainer.fit()
    assert torch.equal(head.bias, before)


def test_a_step_is_one_of_the_optimizer_on_the_loss():
    batch = make_rows()
    for kind in (ClassBalanced, LDAM):
        head, other = make_head(), make_head()
        method = build(kind, head)
        value = method.step(batch)
        loss = build(kind, other).loss(batch[0], other.weight, other.bias, batch[1])
        torch.testing.assert_close(value, loss.detach())
        loss.backward()
        torch.testing.assert_close(head.weight, other.weight - 0.1 * other.weight.grad)


# CMO and AFR: images (N, 1, 4, 6) whose features are their first six pixels.


class FirstRow(nn.Module):
    def forward(self, images):
        return images[:, 0, 0]


def make_images(seed=1, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, 4, WIDTH, generator=generator, dtype=torch.float64)


def make_cmo(head, labels, **options):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    data = iada.TensorData(make_images(rows=len(labels)), labels)
    return CMO(MethodRun(FirstRow(), head, optimizer, COUNTS, data, **options), last_epoch=20)


def balanced_softmax(logits, labels):
    """−log n_y e^{z_y} / Σ_j n_j e^{z_j}, the mean; a class without samples counts as one."""
    shares = COUNTS.clamp(min=1) * logits.exp()
    return -(shares[torch.arange(len(labels)), labels] / shares.sum(dim=1)).log().mean()


def test_cmo_mixes_images_and_losses():
    images, (_, labels) = make_images(), make_rows()
    head, other = make_head(), make_head()
    method = make_cmo(head, labels)
    method._plans.append(Paste(rest=0.5, centre=(0.1, 0.5)))
    count = ROWS // 2
    value = method.step((images, labels, torch.arange(ROWS)))
    # √½ of 4 × 6 pixels is 2.8 × 4.2: halves of 1 and 2 about pixel (0, 3), cut off at the top.
    mixed = images[:count].clone()
    mixed[:, :, 0:1, 1:5] = images[count:, :, 0:1, 1:5]
    share = 1 - 4 / 24
    logits = mixed[:, 0, 0] @ other.weight.T + other.bias
    expected = share * balanced_softmax(logits, labels[:count])
    expected = expected + (1 - share) * balanced_softmax(logits, labels[count:])
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-6)  # π is float32
    expected.backward()
    torch.testing.assert_close(
        head.weight, other.weight - 0.1 * other.weight.grad, rtol=1e-6, atol=1e-6
    )


def test_cmo_pastes_in_half_of_the_steps_between_its_epochs():
    _, labels = make_rows()
    method = make_cmo(make_head(), labels, ce_epochs=2)
    order = [[0, 1, 2]] * 200
    for epoch in (2, 5, 17, 19):
        assert method.begin_epoch(epoch, order, 0) == order
    for epoch in (6, 16):
        wanted = method.begin_epoch(epoch, order, 50)
        pasted = [rows for rows in wanted if len(rows) == 6]
        assert 70 < len(pasted) < 130
        rests = np.array([plan.rest for plan in method._plans if plan is not None])
        # λ is uniform: |λ − ½| has mean ¼ and deviation 0.144. Of four of its errors.
        assert abs(np.abs(rests - 0.5).mean() - 0.25) < 4 * 0.144 / len(rests) ** 0.5
        assert all(rows[:3] == [0, 1, 2] for rows in wanted)
        assert [plan is not None for plan in method._plans] == [len(r) == 6 for r in wanted]
        # A run that goes on at a later step draws the same.
        assert method.begin_epoch(epoch, order[20:], 70) == wanted[20:]


def test_foregrounds_come_equally_often_from_each_class():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    pool = ForegroundPool(labels, np.arange(1000) + 5)
    places = pool.draw(np.random.default_rng(0), 30_000)
    assert np.bincount(labels[places]) == pytest.approx([10_000] * 3, rel=0.05)
    assert set(places[labels[places] == 2]) == set(range(990, 1000))


@pytest.mark.parametrize("rest", [0.0, 0.3, 1.0])
def test_the_box_has_its_share_of_the_area(rest):
    rows, columns = Paste(rest, (0.5, 0.5)).box(320, 640)
    area = (rows.stop - rows.start) * (columns.stop - columns.start) / (320 * 640)
    assert area == pytest.approx(1 - rest, abs=0.01)


def test_the_box_is_that_of_the_published_code():
    """Half of 10 pixels is 5, of which half, cut, is 2 to each side."""
    assert Paste(0.75, (0.5, 0.05)).box(10, 10) == (slice(3, 7), slice(0, 2))


def test_cmo_needs_images_and_labels():
    features, labels = make_rows()
    method = make_cmo(make_head(), labels)
    method._plans.append(Paste(0.5, (0.5, 0.5)))
    with pytest.raises(
        ValueError, match=r"inputs: expected images \(N, channels, H, W\), got shape"
    ):
        method.step((features, labels, torch.arange(ROWS)))

    with pytest.raises(ValueError, match=r"^labels: expected class indices in \[0, \d+\), got 99"):
        make_cmo(make_head(), labels.index_fill(0, torch.tensor([1]), 99))

    class WithoutLabels(torch.utils.data.Dataset):
        def __len__(self):
            return ROWS

    for method in ("cmo", "afr"):
        config = iada.TrainerConfig(method=method, ce_epochs=0)
        with pytest.raises(ValueError, match="train_set: expected an attribute `labels`"):
            iada.Trainer(
                FirstRow(), make_head(), WithoutLabels(), None, config, class_counts=COUNTS
            )


def test_adaptive_thresholds():
    accuracy = torch.tensor([0.9, 0.65, 0.3, math.nan])
    found = adaptive_thresholds(accuracy, torch.tensor(0.7))
    assert found.tolist() == pytest.approx([0.8, 0.65, 0.3, 0.8])


def test_the_minority_is_far_from_the_mean_of_its_class():
    embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.3], [0.0, 1.0], [0.0, 2.0], [2.0, 2.0]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    means = [torch.tensor([4.0, 1.3]), torch.tensor([2.0, 4.0])]
    cosines = [
        float(e @ means[y] / (e.norm() * means[y].norm()))
        for e, y in zip(embeddings, labels, strict=True)
    ]
    for thresholds in ([0.8, 0.8], [0.2, 0.96]):
        found = minority_mask(embeddings, labels, torch.tensor(thresholds))
        want = [c < thresholds[y] for c, y in zip(cosines, labels, strict=True)]
        assert found.tolist() == want
        assert any(want)
        assert not all(want)


@pytest.mark.parametrize("unit", [1.0, 100.0, torch.tensor([2.0, 0.5]).double().view(2, 1, 1)])
def test_the_attack_steps_towards_its_target(unit):
    """Of a linear classifier of two classes the gradient's sign never changes."""
    torch.manual_seed(0)
    weight = torch.randn(2, 2 * 9, dtype=torch.float64)
    images, targets = torch.rand(5, 2, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    before = images.clone()
    moved = targeted_attack(lambda x: x.flatten(1) @ weight.T, images, targets, unit)
    towards = (weight[targets] - weight[1 - targets]).sign().view_as(images)
    torch.testing.assert_close(moved, images + 3 / 255 * unit * towards)
    assert torch.equal(images, before)
    assert not moved.requires_grad


def test_the_categories_are_told_apart():
    torch.manual_seed(0)
    targets = torch.arange(60) % 6
    embeddings = 4 * torch.eye(6, 8)[targets] + torch.randn(60, 8)
    layer = nn.Linear(8, 6)
    fit_categories(layer, embeddings, targets)
    assert (layer(embeddings).argmax(dim=1) == targets).double().mean() > 0.95


def test_small_categories_count_in_the_fit():
    """At the minimum of Balanced Softmax its gradient vanishes; that of CE does not."""
    torch.manual_seed(0)
    targets = torch.tensor([0] * 40 + [1] * 8 + [2] * 2)
    embeddings = torch.randn(50, 2, dtype=torch.float64)
    layer = nn.Linear(2, 3, dtype=torch.float64)
    fit_categories(layer, embeddings, targets)
    prior = torch.tensor([40, 8, 2]).double().log()
    sizes = []
    for shift in (prior, 0 * prior):
        loss = F.cross_entropy(layer(embeddings) + shift, targets)
        sizes.append(float(torch.autograd.grad(loss, layer.bias)[0].abs().max()))
    assert sizes[0] < 1e-5 < 0.1 < sizes[1]


def make_afr(deviation=None, **options):
    """Two classes, each with ten images about one row of pixels and five about another.

    The head knows them all, so that thresholds are 0.8; cosines are about 0.9 and 0.4.
    """
    torch.manual_seed(0)
    patterns = torch.eye(4, dtype=torch.float64)[:, None, :, None].expand(4, 1, 4, WIDTH)
    labels = torch.tensor([0] * 15 + [1] * 15)
    tail = torch.tensor(([False] * 10 + [True] * 5) * 2)
    images = patterns[labels + 2 * tail] + 0.05 * torch.rand(30, 1, 4, WIDTH, dtype=torch.float64)
    data = iada.TensorData(images, labels)
    if deviation is not None:
        data.deviation = torch.tensor([deviation])
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4 * WIDTH)).double()
    head = nn.Linear(4 * WIDTH, 2, dtype=torch.float64)
    head.weight.data = patterns[:2].flatten(1) + patterns[2:].flatten(1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    run = MethodRun(backbone, head, optimizer, torch.bincount(labels), data)
    return AFR(run, finetune_epoch=5, **options), data, tail


def test_afr_prepares_every_ten_epochs_of_the_second_stage():
    method, _, tail = make_afr()
    order = [list(range(30))] * 3
    method.begin_epoch(4, order, 12)
    assert method.prepared_epoch == -1
    state = torch.get_rng_state()
    found = []
    for epoch in (5, 6, 10, 14, 15):
        method.begin_epoch(epoch, order, 3 * epoch)
        found.append((method.prepared_epoch, method.attacked.clone()))
    assert [epoch for epoch, _ in found] == [5, 5, 5, 5, 15]
    for _, attacked in found:
        assert int(attacked.sum()) == 10  # half of the majority
        assert not (attacked & tail).any()
    assert not torch.equal(found[0][1], found[-1][1])
    assert torch.equal(torch.get_rng_state(), state)
    assert len(method.pool.rows) == 40
    assert method.attacker.training is False
    assert method._learner.classifier.backbone.training


def test_afr_goes_on_in_an_epoch_by_what_it_prepared_for_it():
    method, _, _ = make_afr()
    order = [list(range(30))] * 3
    method.begin_epoch(5, order, 0)
    fitted = method.categories.weight.detach().clone()
    method.head.weight.data.neg_()
    method.begin_epoch(5, order[1:], 1)
    assert torch.equal(method.categories.weight, fitted)


def test_a_class_without_minority_has_no_copies(monkeypatch):
    method, data, tail = make_afr()
    monkeypatch.setattr("iada.methods.afr.minority_mask", lambda *_: tail & (data.labels == 0))
    method.begin_epoch(5, [list(range(30))] * 3, 0)
    assert int(method.attacked.sum()) == 5  # half of class 0's majority, and none of class 1
    assert not data.labels[method.attacked].any()


@pytest.mark.parametrize("deviation", [None, 0.25])
def test_afr_attacks_its_copies_alone(deviation):
    method, data, tail = make_afr(deviation)
    method.begin_epoch(5, [list(range(30))] * 3, 0)
    rows = torch.tensor([0, 3, 20, 29])
    images, labels = data.inputs[rows], data.labels[rows]
    pasted = method._foreground(images, labels, Paste(0.5, (0.5, 0.5), adversarial=[1, 2]))
    assert torch.equal(pasted[[0, 3]], images[[0, 3]])
    step = (pasted - images)[[1, 2]].abs().amax()
    assert float(step) == pytest.approx(3 / 255 / (deviation or 1.0))

    def share(inputs):
        """Of the minority categories."""
        return method.categories(method.attacker(inputs)).softmax(dim=1)[:, 2:].sum(dim=1)

    assert (share(pasted) > share(images))[[1, 2]].all()


def test_afr_mixes_as_table_2_has_it():
    """MixUp blends all over the image, in the second stage alone and in the steps asked for."""
    images, foreground = make_images(0, 3), make_images(1, 3)
    plan = Paste(rest=0.3, centre=(0.5, 0.5))
    pasted = CMO._mixed(make_afr()[0], images, foreground, plan)
    method, _, _ = make_afr(mixing="mixup", mix_fraction=1.0)
    order = [[0, 1]] * 40
    for epoch, mixup in ((4, False), (5, True)):
        method.begin_epoch(epoch, order, 0)
        mixed, rest = method._mixed(images, foreground, plan)
        if mixup:
            assert all(step is not None for step in method._plans)
            torch.testing.assert_close(mixed, 0.3 * images + 0.7 * foreground)
            assert rest == 0.3
        else:
            assert torch.equal(mixed, pasted[0])
            assert rest == pasted[1]
    with pytest.raises(ValueError, match="mixing: expected one of 'cutmix', 'mixup'"):
        iada.TrainerConfig.from_settings({"method": "afr", "mixing": "remix"})


def test_afr_s_state_is_whole():
    method, _, _ = make_afr()
    method.begin_epoch(5, [list(range(30))] * 3, 0)
    other, _, _ = make_afr()
    other.load_state_dict(method.state_dict())
    order = [list(range(4))] * 20
    assert other.begin_epoch(6, order, 3) == method.begin_epoch(6, order, 3)
    assert list(other._plans) == list(method._plans)
    assert any(plan is not None and plan.adversarial for plan in other._plans)
