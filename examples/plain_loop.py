"""Meta-IADA in a plain PyTorch loop, on points of which 40 % have a wrong label.

    python examples/plain_loop.py

It prints the test accuracy and which samples were made harder (ε > 0): nobody tells the network
which labels are wrong.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import iada

CLASSES, SIZE, META = 4, 800, 40


def make_points(count: int, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (count, 16) around the centres of their classes, and labels (count)."""
    labels = torch.arange(count) % CLASSES
    return centres[labels] + torch.randn(count, 16), labels


def main(epochs: int = 30, ce_epochs: int = 10) -> float:
    """Train, print, and return the accuracy on clean test points."""
    torch.manual_seed(0)
    centres = 1.2 * torch.randn(CLASSES, 16)
    inputs, truth = make_points(SIZE, centres)
    wrong = torch.rand(SIZE) < 0.4
    labels = torch.where(wrong, (truth + 1) % CLASSES, truth)
    meta_set = TensorDataset(*make_points(META, centres))
    test_inputs, test_labels = make_points(1000, centres)

    # With the sample's place as third part of a batch, the strengths see its history.
    train_set = iada.Indexed(TensorDataset(inputs, labels))
    train_loader = DataLoader(train_set, batch_size=50, shuffle=True)
    meta_stream = iada.endless(DataLoader(meta_set, batch_size=META, shuffle=True))

    backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    head = nn.Linear(32, CLASSES)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    meta = iada.MetaIADA(
        backbone,
        head,
        optimizer,
        class_counts=torch.bincount(labels, minlength=CLASSES),
        memory=iada.TrainingMemory(CLASSES, SIZE),
        alpha=0.1,
        clip_norm=1.0,
    )

    epsilon = torch.zeros(SIZE)
    for epoch in range(epochs):
        for batch in train_loader:
            if epoch < ce_epochs:  # first phase of Algorithm 1
                meta.cross_entropy_step(batch)
            else:
                epsilon[batch[2]] = meta.step(batch, next(meta_stream)).epsilon
        meta.end_epoch()
        schedule.step()

    with torch.no_grad():
        accuracy = float((head(backbone(test_inputs)).argmax(dim=1) == test_labels).float().mean())
    harder = (epsilon > 0).float()
    print(f"test accuracy {accuracy:.3f}")
    print(f"share made harder: right labels {harder[~wrong].mean():.2f}", end=", ")
    print(f"wrong labels {harder[wrong].mean():.2f}")
    return accuracy


if __name__ == "__main__":
    main()
