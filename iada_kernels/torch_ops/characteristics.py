"""The characteristics of a batch on torch operators, in blocks of rows.

The columns are defined in `reference.characteristics`. No temporary grows with N·N, and nothing
waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from iada_kernels.torch_ops.blocking import blocks, join


def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """(N, 8) in the dtype of the logits, at least float32; see `reference.characteristics`."""
    dtype = torch.promote_types(torch.float32, logits.dtype)
    weight = weight.to(dtype)
    class_norm = weight.norm(dim=1)
    unit = F.normalize(features.to(dtype), dim=1)
    parts = []
    for rows in blocks(len(features), max(len(features), *weight.shape)):
        y = labels[rows]
        log_p = logits[rows].to(dtype).log_softmax(dim=1)
        p = log_p.exp()
        label_log_p, label_p = (t.gather(1, y[:, None])[:, 0] for t in (log_p, p))
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)
        others = p.scatter_(1, y[:, None], 0.0)
        columns = [
            -label_log_p,
            label_p - others.amax(dim=1),
            # ‖onehot − p‖² without the cancellation of 1 − p_y at confident samples.
            (others.sum(dim=1).square() + others.square().sum(dim=1)).sqrt(),
            F.cosine_similarity(features[rows].to(dtype), weight[y], dim=1),
            entropy,
            class_norm[y],
            label_p,
            _same_label_fraction(unit, labels, rows, neighbours),
        ]
        parts.append(torch.stack(columns, dim=1))
    return join(parts)


def _same_label_fraction(unit: Tensor, labels: Tensor, rows: slice, neighbours: int) -> Tensor:
    """The fraction of the k nearest other rows by cosine that have the row's label, (n)."""
    k = min(neighbours, len(unit) - 1)
    if k < 1:
        return unit.new_zeros(len(labels[rows]))
    similarity = unit[rows] @ unit.T
    similarity.diagonal(rows.start).fill_(-torch.inf)
    nearest = similarity.topk(k, dim=1, sorted=False).indices
    return (labels[nearest] == labels[rows, None]).to(unit.dtype).mean(dim=1)
