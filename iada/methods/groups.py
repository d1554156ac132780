"""UW and GroupDRO: the methods that know the group of each training sample.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, with g_i the
group of a sample, n_g the training samples of a group, G the number of groups that have any:

    UW          (1/n) Σ_i w_{g_i} CE_i,   w_g = N / (G n_g)
    GroupDRO    Σ_g q_g L_g,   q_g ∝ q_g exp(η (L_g + C / √n_g)) before it, L_g the batch's mean

q is uniform at first; a group without a sample in the batch has L_g = 0, as in the published code
(kohpangwei/group_DRO). That code applies the generalization adjustment C / √n_g to all groups or,
where one C is 0, to none, and adds it to the loss that it prints; here it moves q alone, to which
the gradient is the same. It draws its batches so that groups come equally often (its option
reweight_groups), which for UW stands in place of the weights: `balanced_batches` does either.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.learner import ShardedBatch, linear
from iada.meta.method import Batch, MetaStep, Method, Order
from iada.methods.cmo import ForegroundPool
from iada.methods.options import MethodOptions, MethodRun
from iada.utils.checks import argument_error
from iada.utils.loading import groups_of
from iada.utils.seeds import seed_of
from iada.utils.settings import setting

STREAM = 0x67726F7570  # keeps these draws apart from others of the same seed and step


class GroupMethod(Method):
    """A loss of the samples' CE and groups, `group_loss`.

    Args:
        run: what it is built for: a training set with `groups`, (N) integers from 0, whose batches
            have indices.
        balanced_batches: each batch's rows are drawn anew, with replacement, so that all groups
            come equally often; the draws depend on seed and step alone, and so on no stop. What a
            data set draws follows from seed, step and sample: one that comes twice in a batch is
            the same picture twice.

    Attributes:
        group_counts: training samples of each group, (G); 0 for a number that no sample has.
    """

    def __init__(self, run: MethodRun, balanced_batches: bool = False) -> None:
        super().__init__(**run.arguments)
        groups = _checked_groups(run)
        device = run.head.weight.device
        self.groups = nn.Buffer(groups.to(device), persistent=False)
        counts = torch.bincount(groups).to(device, run.dtype)
        self.group_counts = nn.Buffer(counts, persistent=False)
        self.seed = run.seed
        self.pool: ForegroundPool | None = None
        if balanced_batches:
            self.pool = ForegroundPool(groups.numpy(), np.arange(len(groups)))

    @property
    def num_samples(self) -> int:
        """Of the training set, each of which has its group."""
        return len(self.groups)

    def begin_epoch(self, epoch: int, order: Order, first_step: int) -> Order:
        """The rows as they are, or as many others of balanced groups."""
        if self.pool is None:
            return order
        drawn = []
        for step, rows in enumerate(order, first_step):
            rng = np.random.default_rng(seed_of(self.seed, STREAM, step))
            drawn.append(self.pool.rows[self.pool.draw(rng, len(rows))].tolist())
        return drawn

    def step(self, batch: Batch, meta_batch: Batch | None = None) -> Tensor | MetaStep:
        """One step on (inputs, labels, index); its loss, detached."""
        rows = self._shard(batch)
        groups = self._groups_of(rows)

        def loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = linear(features, weight, bias)
            return self.group_loss(F.cross_entropy(logits, rows.labels, reduction="none"), groups)

        return self._supervised_step(rows, loss)

    def group_loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """The loss () of CE of each sample, (N), and their groups, (N)."""
        raise NotImplementedError

    def _groups_of(self, rows: ShardedBatch) -> Tensor:
        if rows.index is None:
            remedy = "wrap the training set in iada.Indexed; iada.Trainer's batches have it"
            raise argument_error("batch", "(inputs, labels, index)", "no index", remedy)
        return self.groups[rows.index]


def _checked_groups(run: MethodRun) -> Tensor:
    """Of each training sample, (N) int64, on the CPU."""
    groups = groups_of(run.train_set)
    expected = "an attribute `groups`, an integer from 0 for each sample, for methods of groups"
    if groups is None:
        remedy = (
            "add it to the data set, as in iada.TensorData(inputs, labels, groups) or the array "
            "train_groups of an .npz, or take another method"
        )
        raise argument_error("train_set", expected, "none", remedy)
    if int(groups.min()) < 0:
        remedy = "number the groups 0, 1, …"
        raise argument_error("train_set.groups", expected, f"{int(groups.min())}", remedy)
    return groups.cpu()


class Upweighting(GroupMethod):
    """UW: see above.

    Args:
        run, balanced_batches: see `GroupMethod`; balanced batches come without weights.
    """

    def __init__(self, run: MethodRun, balanced_batches: bool = False) -> None:
        super().__init__(run, balanced_batches)
        counts = self.group_counts
        weights = len(self.groups) / (counts.count_nonzero() * counts.clamp(min=1))
        weights = torch.ones_like(counts) if balanced_batches else weights
        self.group_weights = nn.Buffer(weights, persistent=False)

    def group_loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """(1/n) Σ w_g CE."""
        return (losses * self.group_weights[groups].to(losses.dtype)).mean()


class GroupDRO(GroupMethod):
    """GroupDRO: see above.

    Args:
        run, balanced_batches: see `GroupMethod`.
        step_size: η.
        adjustment: C.

    Attributes:
        log_q: log of the groups' weights, (G); −∞ for one without training samples.
    """

    def __init__(
        self,
        run: MethodRun,
        balanced_batches: bool = False,
        step_size: float = 0.01,
        adjustment: float = 0.0,
    ) -> None:
        super().__init__(run, balanced_batches)
        counts = self.group_counts
        self.step_size = step_size
        self.adjustment = nn.Buffer(adjustment * counts.clamp(min=1).rsqrt(), persistent=False)
        start = torch.zeros_like(counts).masked_fill_(counts == 0, -torch.inf)
        self.log_q = nn.Buffer(start.log_softmax(dim=0))

    def group_loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Σ q_g L_g, after q has taken its step."""
        # A product, whose order is fixed: ranks add up the same bits, on a GPU too.
        members = F.one_hot(groups, len(self.log_q)).to(losses.dtype)
        means = (losses @ members) / members.sum(dim=0).clamp(min=1)
        with torch.no_grad():  # in logarithms, so that no loss is too large for exp
            moved = self.log_q + self.step_size * (means.to(self.log_q) + self.adjustment)
            self.log_q.copy_(moved.log_softmax(dim=0))
        return means @ self.log_q.exp().to(means.dtype)


@dataclass(frozen=True)
class UpweightingOptions(MethodOptions):
    """UW: samples weighted by N / (G n_g), for a training set with `groups`.

    balanced_batches: in place of the weights, rows are drawn so that all groups come equally often.
    """

    balanced_batches: bool = False

    def build(self, run: MethodRun) -> Upweighting:
        return Upweighting(run, self.balanced_batches)


@dataclass(frozen=True)
class GroupDROOptions(MethodOptions):
    """GroupDRO (Sagawa et al., ICLR 2020), for a training set with `groups`.

    balanced_batches: rows are drawn so that all groups come equally often.
    group_step_size: of the exponentiated gradient on the groups' weights.
    generalization_adjustment: C of C / √n_g, which is added to a group's loss in that step.
    """

    balanced_batches: bool = False
    group_step_size: float = setting(0.01, above=0)
    generalization_adjustment: float = setting(0.0, least=0)

    def build(self, run: MethodRun) -> GroupDRO:
        step = self.group_step_size, self.generalization_adjustment
        return GroupDRO(run, self.balanced_batches, *step)
