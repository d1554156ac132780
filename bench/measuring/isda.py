"""The class covariance as the published ISDA code estimates it, for comparison."""

import torch
from torch import Tensor


class ISDAEstimator:
    """Running covariance (C, A, A) or variances (C, A) with the N×C×A temporaries of ISDA."""

    def __init__(
        self, num_classes: int, width: int, full: bool, device: torch.device | None = None
    ) -> None:
        self.full = full
        shape = (num_classes, width, width) if full else (num_classes, width)
        self.covariance = torch.zeros(shape, device=device)
        self.average = torch.zeros(num_classes, width, device=device)
        self.amount = torch.zeros(num_classes, device=device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        count, width = features.shape
        num_classes = len(self.amount)
        onehot = features.new_zeros(count, num_classes).scatter_(1, labels[:, None], 1)
        masks = onehot[:, :, None].expand(count, num_classes, width)
        by_class = features[:, None, :].expand(count, num_classes, width) * masks
        share = masks.sum(0)
        share[share == 0] = 1
        average = by_class.sum(0) / share
        spread = by_class - average.expand(count, num_classes, width) * masks
        added = onehot.sum(0)
        weight = torch.nan_to_num(added / (added + self.amount))
        shift = self.average - average
        if self.full:
            batch = torch.bmm(spread.permute(1, 2, 0), spread.permute(1, 0, 2))
            batch = batch / share[:, :, None].expand(num_classes, width, width)
            between = torch.bmm(shift[:, :, None], shift[:, None, :])
            w = weight[:, None, None].expand(num_classes, width, width)
        else:
            batch = spread.pow(2).sum(0) / share
            between = shift.pow(2)
            w = weight[:, None].expand(num_classes, width)
        self.covariance = self.covariance * (1 - w) + batch * w + w * (1 - w) * between
        v = weight[:, None].expand(num_classes, width)
        self.average = self.average * (1 - v) + average * v
        self.amount = self.amount + added
