# %% [markdown]
# # Wrong labels, and finding them
#
# 40 % of the training labels are wrong, and nobody says which. With a hundred images whose labels
# are right, Meta-IADA learns for each sample how far its feature is moved: what it moves the
# other way (ε < 0) is what it does not believe.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

import iada

CLASSES = 10

# %% [markdown]
# ## The data
#
# scikit-learn's 8×8 digits: 50 images of each class to test on, 10 of each for the meta set, the
# rest to train on. Of each class 40 % are given the label of one other class.

# %%
images, target = load_digits(return_X_y=True)
generator = np.random.default_rng(0)
rows = {"test": [], "meta": [], "train": []}
for c in range(CLASSES):
    order = generator.permutation(np.flatnonzero(target == c))
    for part, chosen in zip(rows, np.split(order, [50, 60]), strict=True):
        rows[part] += chosen.tolist()
inputs, target = torch.tensor(images / 16).float(), torch.tensor(target)
truth = target[rows["train"]]
wrong = torch.from_numpy(generator.random(len(truth)) < 0.4)
labels = torch.where(wrong, (truth + 3) % CLASSES, truth)
train_set = TensorDataset(inputs[rows["train"]], labels)
meta_set = TensorDataset(inputs[rows["meta"]], target[rows["meta"]])
test_inputs, test_labels = inputs[rows["test"]], target[rows["test"]]
print(f"{len(labels)} training images, {int(wrong.sum())} wrong; {len(meta_set)} clean ones")

# %% [markdown]
# ## The loop
#
# `iada.Indexed` gives each item its number, so that a `TrainingMemory` follows each sample from
# epoch to epoch. The first 30 epochs are plain cross-entropy; in the next 30 each `step` learns
# from a meta batch and returns the ε of its samples, whose mean over the last ten epochs is kept.

# %%
EPOCHS, PLAIN, LAST = 60, 30, 10


def classifier(seed):
    torch.manual_seed(seed)
    backbone = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64), torch.nn.ReLU()
    )
    head = torch.nn.Linear(64, CLASSES)
    optimizer = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    return backbone, head, optimizer


def test_accuracy(backbone, head):
    with torch.no_grad():
        right = head(backbone(test_inputs)).argmax(dim=1) == test_labels
    return 100 * float(right.float().mean())


def train_meta_iada(seed=0):
    """Test accuracy in percent, and the mean ε of each training sample."""
    backbone, head, optimizer = classifier(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    loader = DataLoader(iada.Indexed(train_set), batch_size=64, shuffle=True)
    meta_stream = iada.endless(DataLoader(meta_set, batch_size=100, shuffle=True))
    meta = iada.MetaIADA(
        backbone,
        head,
        optimizer,
        class_counts=torch.bincount(labels, minlength=CLASSES),
        memory=iada.TrainingMemory(CLASSES, len(train_set)),
        alpha=0.1,
        clip_norm=1.0,
    )
    epsilon = torch.zeros(len(train_set))
    for epoch in range(EPOCHS):
        for batch in loader:
            if epoch < PLAIN:
                meta.cross_entropy_step(batch)
                continue
            result = meta.step(batch, next(meta_stream))
            if epoch >= EPOCHS - LAST:
                epsilon[batch[2]] += result.epsilon / LAST
        meta.end_epoch()
        schedule.step()
    return test_accuracy(backbone, head), epsilon


def train_cross_entropy(seed=0):
    backbone, head, optimizer = classifier(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train_set)).split(64):
            batch, given = train_set[rows]
            loss = F.cross_entropy(head(backbone(batch)), given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return test_accuracy(backbone, head)


plain = train_cross_entropy()
accuracy, epsilon = train_meta_iada()
print(f"test accuracy: cross-entropy {plain:.1f} %, Meta-IADA {accuracy:.1f} %")
assert accuracy > plain

# %% [markdown]
# One seed; the README has eight, and the baseline that is given the meta images to train on.
#
# ## Who is moved which way

# %% alt="Histogram of the mean epsilon of samples with right and with wrong labels"
figure, axis = plt.subplots(figsize=(6, 3), dpi=130, layout="constrained")
bins = np.linspace(float(epsilon.min()), float(epsilon.max()), 40)
axis.hist(epsilon[~wrong].numpy(), bins, alpha=0.7, label="right label")
axis.hist(epsilon[wrong].numpy(), bins, alpha=0.7, label="wrong label")
axis.axvline(0, color="black", linewidth=0.8)
axis.set(xlabel="mean ε over the last ten epochs", ylabel="samples")
axis.legend()
plt.show()

# %% [markdown]
# ## Which labels to look at first
#
# `iada.label_issues` has those of smallest ε first. By chance 40 % of them would be wrong.

# %%
suspects = iada.label_issues(epsilon=epsilon).indices
print(f"AUROC {roc_auc_score(wrong, -epsilon):.3f}")
for count in (20, 100, int(wrong.sum())):
    share = wrong[suspects[:count]].float().mean()
    print(f"of the first {count:4d}, wrong: {100 * share:.0f} %")
assert roc_auc_score(wrong, -epsilon) > 0.8  # by chance 0.5

# %% alt="The twelve images of smallest epsilon with their given and their true label"
figure, axes = plt.subplots(2, 6, figsize=(6, 2.6), dpi=130, layout="constrained")
for axis, row in zip(axes.flat, suspects[:12].tolist(), strict=True):
    axis.imshow(train_set[row][0].view(8, 8), cmap="gray_r")
    axis.set_title(f"given {int(labels[row])}, is {int(truth[row])}", fontsize=8)
    axis.set_axis_off()
plt.show()
