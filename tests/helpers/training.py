"""A small training run that draws from every generator, for tests that stop it and compare."""

import random

import numpy as np
import torch

import iada
from iada.models import mlp

CLASSES = 3
SETTINGS = {
    "method": "meta-iada",
    "epochs": 6,
    "ce_epochs": 2,
    "batch_size": 8,
    "meta_batch_size": 4,
    "lr": 0.05,
    "schedule": "cosine",
    "warmup_epochs": 1,
}


def make_data(count=44, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    inputs = torch.randn(count, 8, generator=generator) + labels[:, None]
    return iada.TensorData(inputs.to(dtype), labels, groups=torch.arange(count) % 4)


class Augmented(torch.utils.data.Dataset):
    """Draws from torch, Python and numpy for each sample, as common augmentations do."""

    def __init__(self, data):
        self.data, self.groups = data, data.groups

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label, _ = self.data[index]
        draws = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return inputs + 0.1 * draws, int(label)


def make_trainer(
    folder=None,
    dropout=0.2,
    num_workers=0,
    observe=None,
    dtype=torch.float32,
    batch_norm=False,
    **settings,
):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.set_num_threads(1)
    backbone, head = mlp(8, (16,), CLASSES, dtype)
    if batch_norm:
        backbone.insert(1, torch.nn.BatchNorm1d(8, dtype=dtype))
    backbone.append(torch.nn.Dropout(dropout))
    config = iada.TrainerConfig.from_settings({**SETTINGS, **settings})
    return iada.Trainer(
        backbone,
        head,
        Augmented(make_data(dtype=dtype)),
        Augmented(make_data(9, 1, dtype)),
        config,
        class_counts=torch.bincount(make_data().labels),
        folder=folder,
        validation_set=make_data(44, 2, dtype),
        num_workers=num_workers,
        observe=observe,
    )


def differences(a, b, place="state"):
    """Where two nested states differ in type, shape, or any bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
        bits = same and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        )
        return [] if bits else [place]
    if type(a) is not type(b):
        return [place]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [place]
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [place]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [place]
