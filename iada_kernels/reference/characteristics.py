"""The eight of the fifteen characteristics that follow from the batch alone, (N, 8).

With p = softmax(z), in the order of the columns (in brackets: the place among the fifteen)

    0 [1] loss CE(z, y)          4  [5] entropy of p
    1 [2] p_y − max_{j≠y} p_j    5  [8] ‖w_y‖₂
    2 [3] ‖onehot(y) − p‖₂       6 [11] p_y
    3 [4] cos(h, w_y)            7 [15] fraction of the k nearest by cosine with label y

A single class (C = 1) has margin 1; a batch of one row has no neighbours: fraction 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """Columns 0 to 7 for features (N, A), logits (N, C), labels (N) in [0, C), weight (C, A)."""
    label_mask = F.one_hot(labels, logits.shape[1]).bool()
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    label_p = p[label_mask]
    others = p.masked_fill(label_mask, 0.0)
    columns = [
        -log_p[label_mask],
        label_p - others.amax(dim=1),
        # ‖onehot − p‖² without the cancellation of 1 − p_y at confident samples.
        (others.sum(dim=1).square() + others.square().sum(dim=1)).sqrt(),
        F.cosine_similarity(features, weight[labels], dim=1),
        -torch.where(p > 0, p * log_p, 0.0).sum(dim=1),
        weight[labels].norm(dim=1),
        label_p,
        same_label_fraction(features, labels, neighbours),
    ]
    return torch.stack(columns, dim=1)


def same_label_fraction(features: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """The fraction of each row's k nearest others by cosine with its label, (N); 0 if alone."""
    count = len(features)
    k = min(neighbours, count - 1)
    if k < 1:
        return features.new_zeros(count)
    unit = F.normalize(features, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = similarity.topk(k, dim=1).indices
    return (labels[nearest] == labels[:, None]).to(features.dtype).mean(dim=1)
