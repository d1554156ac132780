"""`ClassCovariance`: the covariance of each class's features, streamed batch by batch."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from iada.nn.lent_covariance import LentCovariance
from iada.nn.precision import KeepsPrecision
from iada.utils.autocast import full_precision
from iada.utils.checks import (
    argument_error,
    check_batch_values,
    check_choice,
    check_count,
    check_device,
    check_float,
    check_labels,
    check_number,
    values_are_checked,
)
from iada.utils.distributed import (
    Group,
    GroupReference,
    agreed_row_counts,
    gather_rows,
    others_told,
)
from iada_kernels.dispatch import select_backend
from iada_kernels.low_rank import LowRankCovariance, unfolded, unpacked, variances
from iada_kernels.streaming import without_ignored
from iada_kernels.triangular import is_triangular, triangular_shape

PRECISIONS = (torch.float32, torch.float64)
STRUCTURES = ("full", "triangle", "diag", "low-rank")
MANY_LENT = 16


class ClassCovariance(KeepsPrecision):
    """Running covariance Σ, mean μ and count n of each class.

    The state equals the population statistics (division by n) of all features ever passed to
    `update`, however the stream was cut into batches:

        Σ ← (1−w) Σ + w Σ′ + w(1−w)(μ−μ′)(μ−μ′)ᵀ,   μ ← μ + w(μ′−μ),   n ← n+m,   w = m/(n+m)

    for a class with m rows in the batch, of mean μ′ and covariance Σ′. The low-rank structure keeps
    diag(d_c) + U_c U_cᵀ of that, its diagonal exactly. What streaming drops off the diagonal is at
    most √(d_a d_b) at (a, b), and Σ_a d_a in norm; at rank A it is nothing. Σ lives in buffers, so
    that state_dict, .to() and checkpoints carry it; .half() and .bfloat16() leave it in float32.

    Examples:
        >>> state = iada.ClassCovariance(num_classes=2, num_features=3, structure="diag")
        >>> state.update(torch.tensor([[0.0, 0, 0], [2, 4, 6]]), torch.tensor([1, 1]))
        >>> state.covariance[1], state.count
        (tensor([1., 4., 9.]), tensor([0, 2]))

    Args:
        num_classes: C.
        num_features: A.
        structure: "full" keeps (C, A, A), "triangle" the same in half the memory, without what
            symmetry repeats, "diag" the variances only, (C, A), "low-rank" a diagonal and `rank`
            directions of each class.
        rank: r of "low-rank", 0 or more, for which 32 is a start. None for the others.
        shrinkage: n₀ ≥ 0: losses see (1 − λ_c) Σ_c + λ_c S, with λ_c = n₀ / (n₀ + n_c) and S the
            mean of the Σ_c weighted by n_c, so that few samples do not make a covariance of few
            directions (Friedman, "Regularized Discriminant Analysis", JASA 1989). Costs a copy
            of Σ a loss. Not for the low-rank structure.
        device: of the buffers.
        dtype: of the buffers; float32 or float64. None for torch's default, at least float32.
        process_group: of torch.distributed, whose ranks pass each their rows of every batch, as
            many as they have, to `update`: all take in all rows, in the order of ranks, and hold
            the same bits as one process with the whole batch. None for a single process.

    Attributes:
        covariance: Σ, symmetric, (C, A, A) or (C, A), in squared units of the features; of the
            triangle structure these, of which `dense` makes matrices; of the low-rank
            structure (C, (1 + r) A), of which `low_rank` is a view.
        mean: μ, (C, A).
        count: n, (C) int64.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        structure: str = "full",
        rank: int | None = None,
        *,
        shrinkage: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        self._group = GroupReference(process_group)
        check_count("num_classes", num_classes, remedy="pass the size of the head")
        check_count("num_features", num_features, remedy="pass the size of the head")
        check_choice("structure", structure, STRUCTURES)
        self.structure = structure
        check_number("shrinkage", shrinkage)
        if shrinkage < 0 or (shrinkage and structure == "low-rank"):
            expected = "0 with structure='low-rank'" if shrinkage > 0 else "0 or more"
            raise argument_error("shrinkage", expected, repr(shrinkage), "0 leaves Σ as it is")
        self.shrinkage = shrinkage
        self._lent: list[weakref.ref[LentCovariance]] = []
        shape = (num_classes, num_features)
        self.rank = _checked_rank(structure, rank)
        dtype = _checked_dtype(dtype)
        sigma: tuple[int, ...] = (num_classes, num_features * (1 + self.rank))
        if structure == "full":
            sigma = (*shape, num_features)
        elif structure == "triangle":
            sigma = (num_classes, *triangular_shape(num_features))
        self.covariance = nn.Buffer(torch.zeros(sigma, device=device, dtype=dtype))
        self.mean = nn.Buffer(torch.zeros(shape, device=device, dtype=dtype))
        count = torch.zeros(num_classes, device=device, dtype=torch.int64)
        self.count = nn.Buffer(count)

    @property
    def low_rank(self) -> LowRankCovariance:
        """The diagonal (C, A) and the factors (C, A, r) of the low-rank structure, as views."""
        if self.structure in ("full", "triangle"):
            remedy = "build it with structure='low-rank'"
            raise argument_error("structure", "'low-rank'", repr(self.structure), remedy)
        return unpacked(self.covariance, self.mean.shape[1])

    @property
    def variances(self) -> Tensor:
        """The diagonal of Σ, (C, A), in any structure."""
        return variances(self.covariance, self.mean.shape[1])

    def dense(self) -> Tensor:
        """Σ with all its entries in any structure, (C, A, A)."""
        if self.structure in ("full", "triangle"):
            return unfolded(self.covariance, self.mean.shape[1])
        return self.low_rank.dense()

    def class_share(self) -> Tensor:
        """1 − λ_c of `shrinkage`, (C): how much of what losses see is the class's own Σ."""
        count = self.count.to(self.covariance.dtype)
        return torch.where(count > 0, count / (count + self.shrinkage), 0.0)

    @torch.no_grad()
    def shrunk(self, covariance: Tensor | None = None) -> Tensor:
        """Σ, or another in its place, as losses see it; itself without `shrinkage`."""
        sigma = self.covariance if covariance is None else covariance
        if not self.shrinkage:
            return sigma
        weight = self.count.to(sigma.dtype)
        shared = (weight / weight.sum().clamp(min=1)) @ sigma.flatten(1)
        own = self.class_share()[:, None]
        return (own * sigma.flatten(1)).addcmul_(1 - own, shared).view_as(sigma)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        backend: str | None = None,
    ) -> None:
        """Take in one batch, in place; with a process group, the rows of all ranks.

        The buffers change in place. For losses that used them and await their backward, Σ is
        copied first: once an update, and not at all where each loss has its backward before.

        Args:
            features: (N, A), any floating dtype; only their values are used.
            labels: class indices (N), any integer dtype.
            ignore_index: rows with this label are left out.
            backend: as in `fused_loss`.

        Raises:
            ValueError: wrong width, dtype or device; and, on CPU or inside `iada.value_checks()`,
                numbers that are not finite or labels out of range. The state is then untouched,
                and with a process group all ranks raise it. Where values are not checked, rows of
                float16 that are not finite are left out, as a GradScaler leaves out their step.
        """
        group = self._group()
        if not torch.compiler.is_compiling():
            self._group.tell_of_others("ClassCovariance", stacklevel=3)  # no_grad is one
        with others_told(group):
            self._check(features, labels, ignore_index)
        if group is not None:
            counts = agreed_row_counts(len(labels), group)
            features = gather_rows(features, counts, group)
            labels = gather_rows(labels.long(), counts, group)
        if features.dtype is torch.float16 and not values_are_checked(features.device):
            labels = labels_of_finite(features, labels)
        self._take_in(features, labels, ignore_index, backend)

    @torch.no_grad()
    def update_gathered(self, features: Tensor, labels: Tensor) -> None:
        """`update` with rows that are those of all ranks already; it does not communicate."""
        self._check(features, labels, -100)
        self._take_in(features, labels, -100, None)

    def _check(self, features: Tensor, labels: Tensor, ignore_index: int) -> None:
        num_classes, width = self.mean.shape
        for kept in (self.covariance, self.mean):
            if kept.dtype not in PRECISIONS:
                remedy = "call .float(), or load its state without assign=True"
                expected = "statistics in torch.float32 or torch.float64"
                raise argument_error("ClassCovariance", expected, kept.dtype, remedy)
        check_float("features", features, f"a floating-point tensor (N, {width})", (None, width))
        check_labels(labels, len(features))
        for name, tensor in (("features", features), ("labels", labels)):
            check_device(name, tensor, self.mean.device, "the ClassCovariance")
        check_batch_values(features, labels, num_classes, ignore_index, self.mean.dtype)

    def _take_in(
        self, features: Tensor, labels: Tensor, ignore_index: int, backend: str | None
    ) -> None:
        labels = without_ignored(labels.long(), ignore_index, len(self.mean))
        compact = self.rank > 0 or is_triangular(self.covariance, self.mean.shape[1])
        passes = select_backend(backend, self.mean.device, features.dtype, compact=compact)
        self.settle()
        with full_precision(self.mean.device):
            passes.covariance_update(self.covariance, self.mean, self.count, features, labels)

    def reset(self) -> None:
        """Forget everything: zeros in place."""
        self.settle()
        for buffer in (self.covariance, self.mean, self.count):
            buffer.zero_()

    def lend(self, covariance: Tensor) -> LentCovariance:
        """Its own Σ as it stands, for a loss that will want it in its backward."""
        lent = LentCovariance(covariance)
        self._lent.append(weakref.ref(lent))
        if len(self._lent) > MANY_LENT:  # where Σ is only read
            self._lent[:] = [ref for ref in self._lent if (held := ref()) and held.awaited]
        return lent

    def settle(self) -> None:
        """To be called before Σ changes in place: what is lent, and still awaited, gets a copy."""
        if not self._lent or torch.compiler.is_compiling():
            return
        awaited = [lent for ref in self._lent if (lent := ref()) is not None and lent.awaited]
        if current := [lent for lent in awaited if lent.is_now(self.covariance)]:
            copy = self.covariance.clone()
            for lent in current:
                lent.replace(copy)
        self._lent.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lent": []}  # graphs are not copied or saved

    def extra_repr(self) -> str:
        num_classes, width = self.mean.shape
        rank = f", rank={self.rank}" if self.structure == "low-rank" else ""
        rank += f", shrinkage={self.shrinkage}" if self.shrinkage else ""
        return f"{num_classes}, {width}, structure={self.structure!r}{rank}"


def labels_of_finite(features: Tensor, labels: Tensor) -> Tensor:
    """Labels (N), −1, which is no class, for rows of features (N, A) that are not finite."""
    return torch.where(torch.isfinite(features).all(dim=1), labels.long(), -1)


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.promote_types(torch.float32, torch.get_default_dtype())
    if dtype not in PRECISIONS:
        remedy = "statistics of lower precision would drift; features may be of any dtype"
        raise argument_error("dtype", "torch.float32 or torch.float64", dtype, remedy)
    return dtype


def _checked_rank(structure: str, rank: int | None) -> int:
    """r, 0 for the structures without."""
    if structure != "low-rank":
        if rank is not None:
            expected = f"None with structure={structure!r}"
            raise argument_error("rank", expected, repr(rank), "structure='low-rank' has one")
        return 0
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        remedy = "32 is a start; 0 is the diagonal structure"
        raise argument_error("rank", "an int from 0 for structure='low-rank'", repr(rank), remedy)
    return rank
