"""Context-rich Minority Oversampling with Balanced Softmax.

Park et al., "The Majority Can Help the Minority", CVPR 2022, as its published code has it: in half
of the steps (p = 0.5) a box of an image drawn by inverse class frequency is pasted over each image
of the batch, at the same place in all; λ ~ Beta(1, 1) and the box takes 1 − λ of the area. With λ
the share that is left of the background, the loss is λ ℓ(z, y_background) + (1 − λ) ℓ(z,
y_foreground). None in the first four and the last three epochs.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from iada.meta.method import Batch, MetaStep, Order
from iada.methods.head_loss import HeadLossMethod
from iada.methods.options import MethodOptions, MethodRun
from iada.utils.checks import argument_error, check_label_values
from iada.utils.loading import labels_of
from iada.utils.seeds import seed_of

SHARE = 0.5  # of the steps
FIRST_WITHOUT, LAST_WITHOUT = 4, 3  # epochs
STREAM = 0x636D6F  # keeps these draws apart from others of the same seed and step


@dataclass(frozen=True)
class Paste:
    """What one step pastes. rest: λ as drawn; centre: of the box, in shares of height and width.

    adversarial: rows among the foregrounds that are to be attacked first (see `afr`).
    """

    rest: float
    centre: tuple[float, float]
    adversarial: Sequence[int] = ()

    def box(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the box, which the image's border cuts off."""
        share = math.sqrt(1.0 - self.rest)
        sides = []
        for size, centre in zip((height, width), self.centre, strict=True):
            half, middle = int(size * share) // 2, int(size * centre)
            sides.append(slice(max(0, middle - half), min(size, middle + half)))
        return sides[0], sides[1]


class ForegroundPool:
    """Entries of the training set, drawn with replacement so that all classes come equally often.

    labels: of each entry, (M). rows: which row of the training set each is, (M).
    """

    def __init__(self, labels: np.ndarray, rows: np.ndarray) -> None:
        self.rows = rows
        weights = 1.0 / np.bincount(labels)[labels]
        self.cumulative = np.cumsum(weights) / weights.sum()

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` entries' places in the pool."""
        places = np.searchsorted(self.cumulative, rng.random(count), side="right")
        return np.minimum(places, len(self.rows) - 1)


class CMO(HeadLossMethod):
    """See above. Beside each row of such a step another one is loaded: twice the data, one pass.

    Args:
        run: what it is built for: one process, and a training set with its `labels`, (N). All
            draws depend on its seed and the step alone, and so on no stop.
        last_epoch: of the run, until which it takes place.
    """

    def __init__(self, run: MethodRun, last_epoch: int) -> None:
        labels = labels_of(run.train_set)
        if labels is None:
            expected = "an attribute `labels`, a tensor (N), for the methods cmo and afr"
            raise argument_error("train_set", expected, "none", "add it to the data set")
        super().__init__(run, beta=1.0)
        check_label_values(labels, run.head.out_features, None)
        self.labels = labels.cpu()
        self.first_epoch, self.last_epoch, self.seed = run.ce_epochs, last_epoch, run.seed
        self.pool = ForegroundPool(self.labels.numpy(), np.arange(len(labels)))
        self._plans: deque[Paste | None] = deque()

    def begin_epoch(self, epoch: int, order: Order, first_step: int) -> Order:
        """The rows, and after them the foregrounds' in those steps that paste."""
        active = self.first_epoch + FIRST_WITHOUT <= epoch < self.last_epoch - LAST_WITHOUT
        return self._plan(order, first_step, SHARE if active else 0.0)

    def _plan(self, order: Order, first_step: int, share: float) -> Order:
        """Decide for each step whether it pastes, and what."""
        self._plans.clear()
        wanted = []
        for step, rows in enumerate(order, first_step):
            rng = np.random.default_rng(seed_of(self.seed, STREAM, step))
            plan, foregrounds = None, []
            if rng.random() < share:
                centre = (rng.random(), rng.random())
                rest = rng.beta(1.0, 1.0)
                places = self.pool.draw(rng, len(rows))
                foregrounds = self.pool.rows[places].tolist()
                plan = Paste(rest, centre, self._adversarial(places))
            self._plans.append(plan)
            wanted.append([*rows, *foregrounds])
        return wanted

    def _adversarial(self, places: np.ndarray) -> Sequence[int]:
        """Which of the foregrounds are to be attacked: none."""
        return ()

    def step(self, batch: Batch, meta_batch: Batch | None = None) -> Tensor | MetaStep:
        """The loss of the mixed images, or of the images as they are; detached."""
        plan = self._plans.popleft()
        if plan is None:
            return super().step(batch)
        inputs, labels = batch[0], batch[1]
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            got = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else "no tensor"
            raise argument_error("inputs", "images (N, channels, H, W)", got, "take another method")
        count = len(labels) // 2
        foreground = self._foreground(inputs[count:], labels[count:], plan)
        mixed, rest = self._mixed(inputs[:count], foreground, plan)
        batch_rows = self._learner.shard_batch("batch", (mixed, labels[:count]), 0)
        others = labels[count:].long()

        def loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            own = self.loss(features, weight, bias, batch_rows.labels)
            return rest * own + (1.0 - rest) * self.loss(features, weight, bias, others)

        return self._supervised_step(batch_rows, loss)

    def _foreground(self, inputs: Tensor, labels: Tensor, plan: Paste) -> Tensor:
        """What is pasted, (N, channels, H, W)."""
        return inputs

    def _mixed(self, images: Tensor, foreground: Tensor, plan: Paste) -> tuple[Tensor, float]:
        """The images with a box of the foreground (CutMix), and how much of them is left."""
        height, width = images.shape[2:]
        rows, columns = plan.box(height, width)
        mixed = images.clone()
        mixed[:, :, rows, columns] = foreground[:, :, rows, columns]
        box = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, 1.0 - box / (height * width)


@dataclass(frozen=True)
class CMOOptions(MethodOptions):
    """CMO with Balanced Softmax (Park et al., CVPR 2022); no options."""

    single_process: ClassVar[bool] = True
    own_cross_entropy: ClassVar[bool] = True

    @property
    def counts_epochs(self) -> bool:
        return True

    def build(self, run: MethodRun) -> CMO:
        return CMO(run, run.epochs)
