"""The characteristics of a batch on torch operators, in blocks of rows.

The equations are in `reference.characteristics`; this adds only that no temporary has N·N numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from iada_kernels.closed_form.blocking import blocks, join
from iada_kernels.reference import batch_characteristics


def characteristics(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, neighbours: int
) -> Tensor:
    """(N, 8) in the dtype of the logits, at least float32; see `reference.characteristics`."""
    dtype = torch.promote_types(torch.float32, logits.dtype)
    weight = weight.to(dtype)
    unit = F.normalize(features.to(dtype), dim=1)
    parts = []
    for rows in blocks(len(features), max(len(features), *weight.shape)):
        part = batch_characteristics(
            features[rows].to(dtype), logits[rows].to(dtype), labels[rows], weight, 0
        )
        part[:, 7] = _same_label_share(unit, labels, rows, neighbours)
        parts.append(part)
    return join(parts)


def _same_label_share(unit: Tensor, labels: Tensor, rows: slice, neighbours: int) -> Tensor:
    k = min(neighbours, len(unit) - 1)
    if k < 1:
        return unit.new_zeros(len(labels[rows]))
    similarity = unit[rows] @ unit.T
    similarity.diagonal(rows.start).fill_(-torch.inf)
    nearest = similarity.topk(k, dim=1, sorted=False).indices
    return (labels[nearest] == labels[rows, None]).to(unit.dtype).mean(dim=1)
