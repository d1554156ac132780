"""Backbones, batches and a way to read hypergradients, for the tests of the Meta-IADA engine."""

import copy

import torch
from torch import nn

import iada
from iada.models import cifar_resnet
from tests.helpers.problems import reference_loss_of_head

CLASSES = 3


class TransformerBlock(nn.Module):
    """Attention, LayerNorm, dropout and GELU, then the mean over tokens."""

    def __init__(self, width=8, dropout=0.2):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, width)
        )

    def forward(self, inputs):
        x = self.embed(inputs)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return (x + self.feed(self.norm2(x))).mean(dim=1)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8), nn.ReLU())


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


# Each with the shape of one input; the feature width is 8 but for the ResNets'.
BACKBONES = {
    "mlp": (mlp, (6,), 8),
    "conv": (conv, (2, 9, 9), 8),
    "resnet": (lambda: cifar_resnet(8, 4), (3, 8, 8), 16),
    "resnet32": (lambda: cifar_resnet(32), (3, 8, 8), 64),
    "transformer": (TransformerBlock, (4, 5), 8),
    "fused-attention": (lambda: TransformerBlock(dropout=0.0), (4, 5), 8),
}


def make_engine(name="mlp", structure="full", dtype=torch.float64, prepare=None, **options):
    """A MetaIADA over one of BACKBONES; the change of its Σ is, but for rounding, its gradient."""
    torch.manual_seed(0)
    build, _, width = BACKBONES[name]
    backbone, head = build(), nn.Linear(width, CLASSES)
    for p in backbone.parameters():  # BatchNorm's weights and biases away from 1 and 0
        p.data += 0.1 * torch.randn_like(p)
    backbone, head = backbone.to(dtype), head.to(dtype)
    if prepare is not None:
        prepare(backbone, head)
    groups = [
        {"params": list(backbone.parameters()), "lr": 0.05},
        {"params": list(head.parameters()), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(1)  # the perturbation network is the same whatever the backbone drew
    rank = 3 if structure == "low-rank" else None
    covariance = iada.ClassCovariance(CLASSES, width, structure, rank).to(dtype)
    counts = torch.tensor([40, 20, 10])
    literal = {"covariance_lr": 1e6, "persistent": True, "keep_semidefinite": False}  # Eq. 9
    options = literal | options
    return iada.MetaIADA(backbone, head, optimizer, counts, covariance=covariance, **options)


def make_batches(name="mlp", dtype=torch.float64, rows=12, meta_rows=7):
    generator = torch.Generator().manual_seed(1)
    shape = BACKBONES[name][1]
    inputs, meta_inputs = (
        torch.randn(n, *shape, generator=generator).to(dtype) for n in (rows, meta_rows)
    )
    return (inputs, torch.arange(rows) % CLASSES), (meta_inputs, torch.arange(meta_rows) % CLASSES)


def hypergradients(meta, batch, meta_batch, seed=5):
    """{"omega": dΩ in a row, "covariance": dΣ} of one step, which is taken; no Ω, no dΩ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        features = copy.deepcopy(meta.classifier.backbone)(batch[0])
    streamed = copy.deepcopy(meta.covariance)  # the Σ that Eq. 9 starts from
    streamed.update(features, batch[1])
    torch.manual_seed(seed)
    meta.step(batch, meta_batch)
    moved = streamed.covariance - meta.covariance.covariance
    found = {"covariance": moved / meta.covariance_lr}
    if meta.perturbation is not None:
        omega = [p.grad.reshape(-1).clone() for p in meta.perturbation.parameters()]
        found["omega"] = torch.cat(omega)
    return found


def eq_10_by_hand(meta, result, classifier, batch):
    """Gradients of the definition at `classifier`, with the Σ and ε that a step ended with."""
    features, _ = classifier(batch[0])
    loss = reference_loss_of_head(
        classifier.head,
        features,
        batch[1],
        covariance=meta.covariance.covariance,
        epsilon=result.epsilon,
        log_prior=meta.log_prior,
    )
    torch.testing.assert_close(loss.detach(), result.loss)
    classifier.zero_grad()
    loss.backward()


def relative(found, expected):
    """The largest error of each hypergradient, as a share of its largest number, which is not 0."""
    assert all(value.any() for value in expected.values())
    return {
        name: float((found[name].double() - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    }
