"""The IADA loss as a module, `IADALoss`, with the state it needs."""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from iada.nn.arguments import Extras, loss_of_rows, not_both
from iada.nn.autograd import IADALossFunction, lender
from iada.nn.class_covariance import ClassCovariance
from iada.nn.precision import KeepsPrecision
from iada.nn.priors import log_class_prior
from iada.utils.checks import (
    argument_error,
    check_loss_options,
    check_weights,
    values_are_checked,
)
from iada.utils.distributed import Group, GroupReference, others_told
from iada_kernels.contract import ClassStatistics, LossInputs, LossOptions
from iada_kernels.dispatch import backend_for

CALLER = 4  # frames from forward to who called the module


def streams_batch(criterion: nn.Module) -> bool:
    """Whether a call takes its batch in: in training mode, unless a backward repeats the call.

    As that of `torch.utils.checkpoint` does, whose forward has taken the batch in.
    """
    if torch.compiler.is_compiling():
        return criterion.training
    return criterion.training and torch._C._current_graph_task_id() == -1


def _may_overflow(features: Tensor) -> bool:
    """Whether rows that are not finite are to be kept out of the statistics, apart from the loss.

    A GradScaler skips the step of a float16 batch that overflows. Elsewhere such a batch is an
    error, where values are checked, or the end of training.
    """
    return features.dtype is torch.float16 and not values_are_checked(features.device)


class IADALoss(KeepsPrecision):
    """The loss with its class covariance and log prior.

    Examples:
        >>> criterion = iada.IADALoss(10, 64, class_counts=torch.bincount(train_labels), alpha=0.1)
        >>> loss = criterion(features, head.weight, head.bias, labels)
        >>> int(criterion.covariance.count.sum()) == len(labels)
        True

    In training mode each call first streams the batch's detached features into the covariance; loss
    and update are one call of the backend. Several calls before one `backward`, as for a sum of
    losses, cost a copy of Σ for each but the last; with a `backward` after each nothing is copied.
    Inside `torch.utils.checkpoint` a batch is streamed once: a call that a backward repeats leaves
    the covariance as it is. Before a validation loss call `eval()`: in training mode its features
    would be streamed too, `no_grad` or not.

    Args:
        num_classes: C.
        num_features: A.
        class_counts: training samples of each class, (C), from which π follows; None for no
            adjustment. With them the head's logits are for equally frequent classes: add beta *
            log_prior where data has the training set's shares.
        structure: of the covariance, see `ClassCovariance`.
        alpha: weight of the quadratic term; a plain attribute, to be annealed.
        beta: weight of the log prior; likewise.
        class_weight: of each class, (C), as in `fused_loss`; kept in a buffer.
        label_smoothing: as in `fused_loss`; not beside class_weight.
        ignore_index: as in `fused_loss`.
        reduction: as in `fused_loss`.
        backend: as in `fused_loss`.
        device: of the buffers.
        dtype: of the buffers; float32 or float64.
        process_group: of torch.distributed, whose ranks call it in training mode each with their
            rows of the batch, as many as they have. None for a single process.
        rank: of the low-rank structure, see `ClassCovariance`.
        shrinkage: of the classes' covariances to one that they share, see `ClassCovariance`.

    With a process group, in training mode, the mean over the ranks of what is returned is the loss
    of one process with the whole batch, and so for the gradients, which DistributedDataParallel and
    FSDP average: a rank's mean is world_size · Σ w ℓ of its own rows / Σ w of all rows, and "sum"
    is times world_size; the losses of "none" are each row's own. The covariance takes in the rows
    of all ranks. In evaluation mode nothing is exchanged: the loss is that of the rank's own rows.
    """

    log_prior: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        class_counts: Tensor | None = None,
        structure: str = "full",
        alpha: float = 0.5,
        beta: float = 1.0,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Group = None,
        rank: int | None = None,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (num_classes, num_features, structure, rank)
        self.covariance = ClassCovariance(
            *sizes, **place, process_group=process_group, shrinkage=shrinkage
        )
        self._group, self._told = GroupReference(process_group), False
        check_loss_options(LossOptions(alpha, beta, ignore_index, reduction, label_smoothing))
        if class_weight is not None and label_smoothing:
            raise not_both()
        if class_weight is not None:
            check_weights("class_weight", class_weight, num_classes, always=True)
        prior = None if class_counts is None else log_class_prior(class_counts, num_classes)
        for name, values in {"log_prior": prior, "class_weight": class_weight}.items():
            if values is not None:
                values = values.detach().to(**place, copy=True)
            self.register_buffer(name, values)
        self.alpha, self.beta, self.label_smoothing = alpha, beta, label_smoothing
        self.ignore_index, self.reduction = ignore_index, reduction
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        epsilon: Tensor | None = None,
        row_weight: Tensor | None = None,
        return_logits: bool = False,
    ) -> Tensor:
        """Eq. 6 for a batch, which the covariance takes in first in training mode.

        Args:
            features: (…, A), of any floating dtype.
            weight: the head's weight, (C, A).
            bias: the head's bias, (C), or None.
            labels: class indices, (…).
            epsilon: strength of each row, (…), or None for 0.
            row_weight: of each row, (…); a constant.
            return_logits: return (loss, logits).

        Returns:
            The loss, () or as `reduction` has it, in float32 or better.

        Raises:
            ValueError: as `fused_loss`; the statistics are then untouched.
        """
        state, streams = self.covariance, streams_batch(self)
        if streams and not torch.compiler.is_compiling():
            self._group.tell_of_others("IADALoss", CALLER)
            if not self._told:
                self._warn_of_validation()
        sigma = state.covariance if self.training else state.shrunk()
        inputs = LossInputs(features, weight, bias, labels, sigma, epsilon, self.log_prior)
        options = LossOptions(
            self.alpha, self.beta, self.ignore_index, self.reduction, self.label_smoothing
        )
        extras = Extras(self.class_weight, row_weight, return_logits)
        group = self._group()
        if self.training and (group is not None or state.shrinkage):
            return self._of_own_rows(inputs, options, extras, group, streams)

        self._check_head(weight)

        def compute(inputs: LossInputs, options: LossOptions) -> Tensor:
            passes = backend_for(inputs, options, self.backend)
            stream = None
            if streams and _may_overflow(inputs.features):
                rows = (inputs.features, inputs.labels)
                state.update(*rows, ignore_index=options.ignore_index, backend=self.backend)
            elif streams:
                state.settle()
                stream = ClassStatistics(state.mean, state.count)
            return IADALossFunction.apply(options, passes, stream, lender(state), *inputs)

        return loss_of_rows(compute, inputs, options, extras, streams)

    def _of_own_rows(
        self,
        inputs: LossInputs,
        options: LossOptions,
        extras: Extras,
        group: Group,
        streams: bool,
    ) -> Tensor:
        """This rank's share of the loss of all rows, which the covariance takes in by itself."""
        state = self.covariance
        with contextlib.ExitStack() as checks:

            def compute(inputs: LossInputs, options: LossOptions) -> Tensor:
                passes = backend_for(inputs, options, self.backend)
                checks.close()  # passed: from here on ranks exchange
                rows = (inputs.features, inputs.labels)
                if streams:
                    state.update(*rows, ignore_index=options.ignore_index, backend=self.backend)
                inputs = inputs._replace(covariance=state.shrunk())
                return IADALossFunction.apply(options, passes, None, lender(state), *inputs)

            checks.enter_context(others_told(group))
            self._check_head(inputs.weight)
            return loss_of_rows(compute, inputs, options, extras, streams, group)

    def _warn_of_validation(self) -> None:
        """Criteria are seldom modules with a mode: `model.eval()` does not reach this one."""
        if not torch.is_grad_enabled():
            self._told = True
            warnings.warn(
                "IADALoss: called in training mode without gradients, which streams these rows "
                "into its covariance; call criterion.eval() before a validation loss",
                stacklevel=CALLER + 1,
            )

    def _check_head(self, weight: Tensor) -> None:
        """Of the classes and features that the statistics are of."""
        sizes = tuple(self.covariance.mean.shape)
        found = tuple(weight.shape) if isinstance(weight, Tensor) else sizes
        if len(found) == 2 and found != sizes:
            remedy = f"build it with IADALoss(num_classes={found[0]}, num_features={found[1]})"
            expected = f"a head {sizes}, as IADALoss was built for"
            raise argument_error("weight", expected, f"shape {found}", remedy)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, reduction={self.reduction!r}"
