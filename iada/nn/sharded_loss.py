"""The loss of a head whose classes are split over processes, as vocabulary-parallel heads are.

Rank r holds a block J of the classes: the rows of W, b, Σ, μ and n of J. With z̃ of Eq. 6,

    ℓ_i = log(1 + exp(logsumexp_{j≠y} z̃_ij − z̃_iy))

needs from the other ranks, for each row i: w_y (for s, and for R with a diagonal Σ), the diagonal
of Σ_y or the row R[y, ·], a maximum and a sum of exponentials over j, and z̃_iy. Each is a sum
over ranks of which one has the value and the others zeros: an all_reduce, whose backward is the
sum of the gradients of all ranks.

With N rows of all ranks, a step exchanges, forward and backward together, 2 N·A for the features
where ranks have their own rows, N·A for s, 3 N·A for a diagonal Σ, 2 (C·A + N·C) for any other.
No rank holds more than its classes' logits, (N, C / ranks), but for the head and (N, C) where Σ is
not diagonal.
"""

from typing import Any

import torch
from torch import Tensor, nn

from iada.nn.class_covariance import ClassCovariance
from iada.nn.class_parallel import (
    Entry,
    Rows,
    Sum,
    diagonal_form,
    log_sum_exp,
    perturbation_sign,
    table_form,
)
from iada.nn.iada_loss import streams_batch
from iada.nn.precision import KeepsPrecision
from iada.nn.priors import log_class_prior
from iada.utils.autocast import full_precision
from iada.utils.checks import (
    argument_error,
    check_batch_values,
    check_choice,
    check_count,
    check_finite,
    check_float,
    check_loss_options,
    check_loss_tensors,
    is_sharded,
    values_are_checked,
)
from iada.utils.distributed import (
    Group,
    GroupReference,
    agreed_row_counts,
    gather_rows,
    others_told,
    rank_of,
    size_of,
)
from iada_kernels.contract import LossInputs, LossOptions
from iada_kernels.torch_ops.reduction import mean_divisor, reduced

ROWS = ("own", "shared")


class ShardedIADALoss(KeepsPrecision):
    """`IADALoss` for a head split by classes over the ranks of a process group.

    Examples:
        >>> torch.distributed.init_process_group()
        >>> group = torch.distributed.group.WORLD
        >>> criterion = iada.ShardedIADALoss(10, 64, group, class_counts)
        >>> head = torch.nn.Linear(64, len(criterion.classes))  # this rank's classes
        >>> loss = criterion(features, head.weight, head.bias, labels)

    Each rank holds W, b, Σ, μ, n and log π of its classes alone: `classes`, blocks of
    ⌈C / ranks⌉ in the order of ranks, as DTensor's Shard(0), so that a head sharded by FSDP2
    (`fully_shard`) or `distribute_tensor` may be passed as it is. In training mode each call first
    streams the batch's detached features into the covariance.

    Args:
        num_classes: C, of all ranks together; at least 2.
        num_features: A.
        process_group: of torch.distributed; its ranks call it together.
        class_counts: training samples of all classes, (C), from which π follows; or None.
        structure: as in `ClassCovariance`, for the own classes alone; "full" is c·A² for c of them.
        rows: "own": each rank passes its own rows of the batch, as many as it has. "shared": all
            pass the same rows, as tensor-parallel ranks do.
        alpha: as in `fused_loss`.
        beta: as in `fused_loss`.
        ignore_index: as in `fused_loss`.
        reduction: "mean" or "sum".
        device: of the buffers.
        dtype: of the buffers; float32 or float64.
        rank: of the low-rank structure, see `ClassCovariance`.

    Every rank gets the loss of the whole batch. After `backward` on every rank, the gradients of
    weight and bias are those of one process, to rounding: leave them out of
    DistributedDataParallel. So are those of features and epsilon where rows are shared; where
    they are own, they are times the number of ranks, so that gradients of the backbone, averaged
    as DistributedDataParallel and FSDP do, are those of one process.

    In evaluation mode the same is exchanged, and Σ does not change, as it would in training mode,
    `no_grad` or not: call `eval()` before a validation loss. Its backward can be differentiated
    again with a diagonal Σ, not with another.
    """

    log_prior: Tensor | None

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        process_group: Group,
        class_counts: Tensor | None = None,
        structure: str = "diag",
        rows: str = "own",
        alpha: float = 0.5,
        beta: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("rows", rows, ROWS)
        check_choice("reduction", reduction, ("mean", "sum"))
        check_loss_options(LossOptions(alpha, beta, ignore_index, reduction))
        check_count("num_classes", num_classes, 2, "a head of one class has no loss")
        self._group = GroupReference(process_group)
        most = -(-num_classes // size_of(process_group))
        first = min(num_classes, rank_of(process_group) * most)
        self.classes = range(first, min(num_classes, first + most))
        self.num_classes, self.num_features, self.rows = num_classes, num_features, rows
        count = max(1, len(self.classes))  # a rank without classes keeps the zeros of one
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.covariance = ClassCovariance(count, num_features, structure, rank, **place)
        prior = None
        if class_counts is not None:
            prior = log_class_prior(class_counts, num_classes)[first : self.classes.stop]
            prior = prior.to(**place, copy=True)  # a view would keep, and save, all classes'
        self.register_buffer("log_prior", prior)
        self.alpha, self.beta = alpha, beta
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        epsilon: Tensor | None = None,
    ) -> Tensor:
        """Eq. 6, (), for features (N, A), the own classes' weight (c, A) and bias (c).

        weight and bias may be DTensors, sharded along their classes over the group. labels (N) are
        those of all classes, epsilon (N).
        """
        group = self._group()
        with others_told(group):
            weight = self._own_part("weight", weight)
            bias = None if bias is None else self._own_part("bias", bias)
            self._check(LossInputs(features, weight, bias, labels, None, epsilon))
        counts = agreed_row_counts(len(labels), group)
        mean, prior = self.covariance.mean, self.log_prior
        dtype = LossInputs(features, weight, bias, labels, mean, epsilon, prior).compute_dtype
        features = features.to(dtype)  # sums of gradients over ranks are at that precision too
        labels = labels.long()
        if self.rows == "own":
            labels = gather_rows(labels, counts, group)
            features = self._all_rows(features, counts)
            epsilon = None if epsilon is None else self._all_rows(epsilon, counts)
        else:
            features = Entry.apply(features, self._group, True)
            epsilon = None if epsilon is None else Entry.apply(epsilon, self._group, True)
        weight = Entry.apply(weight, self._group, False)
        bias = None if bias is None else Entry.apply(bias, self._group, False)
        with full_precision(features.device):
            if streams_batch(self):
                self._update(features.detach(), labels)
            return self._loss(LossInputs(features, weight, bias, labels, mean, epsilon, prior))

    def _all_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks, in the order of ranks; differentiable."""
        before = sum(counts[: rank_of(self._group())])
        after = sum(counts) - before - len(rows)
        padding = (0, 0) * (rows.dim() - 1) + (before, after)
        return Sum.apply(nn.functional.pad(rows, padding), self._group)

    def _own_part(self, name: str, parameter: Tensor) -> Tensor:
        """This rank's part of a DTensor, and any other tensor as it is."""
        if not is_sharded(parameter):
            return parameter
        group = self._group()
        mesh, (placement, *others) = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        if others or not placement.is_shard(0) or mesh.size() != size_of(group):
            expected = f"a DTensor sharded along its classes over the {size_of(group)} ranks"
            got = f"placements {tuple(parameter.placements)} on {mesh}"  # type: ignore[attr-defined]
            remedy = f"{name}.redistribute(mesh, [Shard(0)]), on a mesh of the group's ranks"
            raise argument_error(name, expected, got, remedy)
        local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
        return local

    def _check(self, inputs: LossInputs) -> None:
        features, epsilon = inputs.features, inputs.epsilon
        width, own = self.num_features, len(self.classes)
        check_float("features", features, f"a floating-point tensor (N, {width})", (None, width))
        expected = f"a floating-point tensor ({own}, {width}), the rows of {self.classes}"
        check_float("weight", inputs.weight, expected, (own, width))
        check_loss_tensors(inputs)
        dtype = torch.promote_types(torch.float32, features.dtype)
        check_batch_values(features, inputs.labels, self.num_classes, self.ignore_index, dtype)
        if epsilon is not None and values_are_checked(epsilon.device):
            check_finite("epsilon", epsilon.detach(), "look at the perturbation network's output")

    def _update(self, features: Tensor, labels: Tensor) -> None:
        """The own classes' statistics take in the rows of all ranks."""
        own, place = self._of_own_classes(labels)
        self.covariance.update_gathered(features, torch.where(own, place, -100))

    def _of_own_classes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows have a label of the own classes, and its place among them, 0 for others."""
        own = (labels >= self.classes.start) & (labels < self.classes.stop)
        own = own & (labels != self.ignore_index)
        return own, torch.where(own, labels - self.classes.start, 0)

    def _loss(self, inputs: LossInputs) -> Tensor:
        rows = Rows(*self._of_own_classes(inputs.labels), self._group)
        options = LossOptions(self.alpha, self.beta, self.ignore_index, self.reduction)
        dtype = inputs.compute_dtype
        weight = inputs.weight.to(dtype)
        z = inputs.features @ weight.T
        if inputs.bias is not None:
            z = z + inputs.bias.to(dtype)
        sigma, label_weight = self.covariance.covariance, None
        is_diagonal = sigma.shape[1:] == (self.num_features,)
        if inputs.epsilon is not None or is_diagonal:
            label_weight = rows.of_labels(weight)
        if inputs.epsilon is not None:
            assert label_weight is not None
            sign = perturbation_sign(z.detach(), weight.detach(), label_weight, rows)
            z = z + inputs.epsilon.to(dtype)[:, None] * (sign @ weight.T)
        if label_weight is None or not is_diagonal:
            form = table_form(weight, self.covariance, self.classes, self.num_classes, rows)
        else:
            form = diagonal_form(weight, label_weight, sigma, self.num_classes, rows)
        z = z + self.alpha * form
        if inputs.log_prior is not None:
            z = z + self.beta * inputs.log_prior.to(dtype)
        # y apart from the others: 1 − p_y keeps its digits on a confident sample.
        others = log_sum_exp(rows.without_label(z), rows)
        losses = torch.logaddexp(torch.zeros_like(others), others - rows.label_logit(z))
        ignored = inputs.labels == self.ignore_index
        losses = losses.masked_fill(ignored, 0.0)
        return reduced(losses, mean_divisor(ignored, options), options)

    def extra_repr(self) -> str:
        classes = f"{self.classes} of {self.num_classes} classes"
        return f"{classes}, {self.num_features}, {self.rows} rows"
