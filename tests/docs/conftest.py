"""What the examples of docstrings and pages take for granted, as small as it can be."""

import os

import pytest
import torch
import torch._functorch.config

import iada
import iada_kernels


class Model(torch.nn.Module):
    """Images in, features out, with its head beside the layers."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        return self.backbone(images)


@pytest.fixture
def example_names():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU())
    head = torch.nn.Linear(64, 10)
    train_labels = torch.arange(40) % 10
    train_set = torch.utils.data.TensorDataset(torch.randn(40, 20), train_labels)
    meta_set = torch.utils.data.TensorDataset(torch.randn(10, 20), torch.arange(10))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.01)
    class_counts = torch.bincount(train_labels)
    rows = {"X": train_set.tensors[0], "X_meta": meta_set.tensors[0], "X_test": torch.randn(8, 20)}
    rows |= {"y": train_labels, "y_meta": meta_set.tensors[1]}
    return {
        **{name: tensor.numpy() for name, tensor in rows.items()},
        "iada": iada,
        "iada_kernels": iada_kernels,
        "os": os,
        "torch": torch,
        "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
        "backbone": backbone,
        "head": head,
        "model": Model(backbone, head),
        "optimizer": optimizer,
        "config": iada.TrainerConfig(epochs=2, ce_epochs=1, batch_size=20, meta_batch_size=10),
        "train_labels": train_labels,
        "class_counts": class_counts,
        "log_prior": iada.log_class_prior(class_counts),
        "num_classes": 10,
        "num_features": 64,
        "train_set": train_set,
        "meta_set": meta_set,
        "loader": torch.utils.data.DataLoader(train_set, batch_size=10),
        "meta_loader": torch.utils.data.DataLoader(meta_set, batch_size=10),
        "images": torch.randn(8, 20),
        "features": torch.randn(8, 64),
        "weight": torch.randn(10, 64),
        "bias": torch.zeros(10),
        "labels": torch.arange(8),
        "meta": iada.MetaIADA(backbone, head, optimizer, class_counts),
    }


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A folder to write to, and one process to be initialised, as torchrun would start it."""
    monkeypatch.chdir(tmp_path)
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **addresses}.items():
        monkeypatch.setenv(name, value)
    with torch._functorch.config.patch(donated_buffer=False):  # put back at the end
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
