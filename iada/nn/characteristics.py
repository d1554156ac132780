"""The fifteen training characteristics f that the perturbation network sees.

The paper's own list is in an appendix that is not public. 1 to 10 are the list of a sibling paper
of its first author, CLP; the others are this project's choice, among them some of CAAT's and
Meta-CALA's. With p = softmax(z), in the order of the columns and of `CHARACTERISTICS`:

     1 loss ℓ = CE(z, y)                  9 loss − class-mean loss
     2 margin p_y − max_{j≠y} p_j        10 margin − class-mean margin
     3 ‖onehot(y) − p‖₂                  11 p_y
     4 cos(h, w_y)                       12 class-mean margin of the last epoch
     5 entropy of p                      13 loss − the sample's loss last epoch
     6 class proportion π_y              14 margin − the sample's margin last epoch
     7 class-mean loss of the last epoch 15 share of the same label among the k nearest
     8 ‖w_y‖₂                               (by cosine of features, in the batch)

7, 9, 10, 12 are 0 until an epoch with a sample of the class has ended; 13 and 14 are 0 for a sample
not seen before, and where the data set gives no sample index.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.nn.precision import KeepsPrecision
from iada.utils.autocast import full_precision
from iada.utils.checks import (
    argument_error,
    check_count,
    check_device,
    check_float,
    check_indices,
    check_label_values,
    check_labels,
    values_are_checked,
)
from iada_kernels.dispatch import select_backend

CHARACTERISTICS = (
    "loss", "margin", "distance", "cosine", "entropy",
    "proportion", "class-loss", "weight-norm", "loss-excess", "margin-excess",
    "probability", "class-margin", "loss-change", "margin-change", "neighbours",
)  # fmt: skip
PROPORTION = CHARACTERISTICS.index("proportion")


def loss_and_margin(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """CE in nats and p_y − max_{j≠y} p_j, each (N); the margin of a single class is 1."""
    probability = logits.softmax(dim=1)
    own = probability.gather(1, labels[:, None])
    others = probability.scatter(1, labels[:, None], 0.0)
    return F.cross_entropy(logits, labels, reduction="none"), own[:, 0] - others.amax(dim=1)


class TrainingMemory(KeepsPrecision):
    """Last epoch's loss and margin: the mean of each class, the value of each sample.

    Args:
        num_classes: C.
        num_samples: size of the training set, where it gives sample indices; else 0.
        device: of the buffers.
        dtype: of the buffers.
    """

    def __init__(
        self,
        num_classes: int,
        num_samples: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def zeros(*shape: int, dtype: torch.dtype | None = dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        # The last axis of each is (loss, margin).
        self.class_means = nn.Buffer(zeros(num_classes, 2))
        self.class_sums = nn.Buffer(zeros(num_classes, 2))
        self.class_counts = nn.Buffer(zeros(num_classes, dtype=torch.int64))
        self.epochs = nn.Buffer(zeros(dtype=torch.int64))
        self.samples = nn.Buffer(zeros(num_samples, 2))
        self.seen = nn.Buffer(zeros(num_samples, dtype=torch.bool))

    def check_classes(self, num_classes: int) -> None:
        """ValueError if it is of another number of classes."""
        if len(self.class_means) != num_classes:
            expected, got = f"one of {num_classes} classes", f"one of {len(self.class_means)}"
            remedy = f"build it with iada.TrainingMemory({num_classes}, num_samples)"
            raise argument_error("memory", expected, got, remedy)

    @torch.no_grad()
    def record(
        self, loss: Tensor, margin: Tensor, labels: Tensor, index: Tensor | None = None
    ) -> None:
        """Record one batch of the current epoch.

        Args:
            loss: of each row, (N), in nats.
            margin: p_y less the largest other probability, (N).
            labels: (N) int64.
            index: of each row in the training set, (N) integers, or None.
        """
        values = torch.stack([loss, margin], dim=1).to(self.class_sums.dtype)
        places = None
        if index is not None and len(self.samples):
            places = self.places(index, len(labels))
        self.class_sums.index_add_(0, labels, values)
        self.class_counts.index_add_(0, labels, torch.ones_like(labels))
        if places is not None:
            self.samples[places] = values
            self.seen[places] = True

    def places(self, index: Tensor, count: int) -> Tensor:
        """Of samples among those that it follows, (N) int64; ValueError for what is none."""
        check_indices("index", index, count, "places in the training set")
        if count and values_are_checked(index.device):
            low, high = index.aminmax()
            if low < 0 or high >= len(self.samples):
                expected, got = f"places in [0, {len(self.samples)})", f"{int(low)} to {int(high)}"
                remedy = "build the TrainingMemory for the whole training set"
                raise argument_error("index", expected, got, remedy)
        return index.long()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """What was recorded becomes the last epoch; a class not seen keeps its means."""
        means = self.class_sums / self.class_counts.clamp(min=1)[:, None]
        self.class_means.copy_(torch.where(self.class_counts[:, None] > 0, means, self.class_means))
        self.class_sums.zero_()
        self.class_counts.zero_()
        self.epochs.add_(1)


@torch.no_grad()
def characteristics(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    log_prior: Tensor,
    memory: TrainingMemory | None = None,
    index: Tensor | None = None,
    neighbours: int = 5,
    backend: str | None = None,
) -> Tensor:
    """The fifteen characteristics of each sample, (N, 15), detached, at least float32.

    The paper's own list is in an appendix that is not public; the columns here are this project's
    choice (docs/theory.md has them).

    Examples:
        >>> log_prior = iada.log_class_prior(torch.bincount(train_labels))
        >>> iada.characteristics(features, head(features), labels, head.weight, log_prior).shape[1]
        15

    Args:
        features: h, (N, A).
        logits: z = Wh + b, (N, C).
        labels: y, (N), integers in [0, C).
        weight: the head's W, (C, A).
        log_prior: log π, (C), for column 6.
        memory: last epoch's means; None leaves columns 7, 9, 10, 12, 13 and 14 at 0.
        index: of each sample in the training set, (N) integers, for columns 13 and 14.
        neighbours: k of column 15.
        backend: as in `fused_loss`.

    Raises:
        ValueError: what does not fit together; and, on CPU or inside `iada.value_checks()`,
            labels or index out of range.
    """
    check_float("features", features, "a floating-point tensor (N, A)", (None, None))
    count, width = features.shape
    check_float("weight", weight, f"the head's weight (C, {width})", (None, width))
    num_classes = len(weight)
    check_float("logits", logits, f"logits ({count}, {num_classes})", (count, num_classes))
    check_float("log_prior", log_prior, f"log priors ({num_classes},)", (num_classes,))
    check_labels(labels, count)
    check_count("neighbours", neighbours)
    places = {"logits": logits, "labels": labels, "weight": weight, "log_prior": log_prior}
    for name, tensor in places.items():
        check_device(name, tensor, features.device, "features")
    labels = labels.long()
    if values_are_checked(labels.device):
        check_label_values(labels, num_classes, None)
    if memory is not None:
        memory.check_classes(num_classes)
    dtype = torch.promote_types(torch.float32, logits.dtype)
    h, z, w = features.to(dtype), logits.to(dtype), weight.to(dtype)

    passes = select_backend(backend, z.device, z.dtype)
    with full_precision(z.device):
        batch = passes.characteristics(h, z, labels, w, neighbours)
    loss, margin, distance, cosine, entropy, norm, own, share = batch.unbind(dim=1)
    zero = torch.zeros_like(loss)
    class_loss = class_margin = loss_excess = margin_excess = loss_change = margin_change = zero
    if memory is not None:
        means = memory.class_means[labels].to(dtype)
        class_loss, class_margin = means.unbind(dim=1)
        known = means.any(dim=1)  # 0 and 0 are no means: without a margin the loss is log 2 or more
        loss_excess = torch.where(known, loss - class_loss, zero)
        margin_excess = torch.where(known, margin - class_margin, zero)
        if index is not None and len(memory.samples):
            place = memory.places(index, count)
            before, seen = memory.samples[place].to(dtype), memory.seen[place]
            loss_change = torch.where(seen, loss - before[:, 0], zero)
            margin_change = torch.where(seen, margin - before[:, 1], zero)

    proportion = log_prior.to(dtype).exp()[labels]
    columns = [loss, margin, distance, cosine, entropy]
    columns += [proportion, class_loss, norm, loss_excess, margin_excess]
    columns += [own, class_margin, loss_change, margin_change, share]
    return torch.stack(columns, dim=1)
