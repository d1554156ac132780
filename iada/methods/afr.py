"""Adversarial Feature Re-calibration: CMO, then fine-tuning on samples moved to their class's tail.

Zhang, Feng and Jin, "Robust Long-Tailed Image Classification via Adversarial Feature
Re-Calibration", VISAPP 2024. Every ten epochs of the second stage

 1. all training samples are embedded; those of a class whose cosine to the class's mean embedding
    is below a threshold are its minority. The threshold is λ = 0.8, or the accuracy a_c of the
    class on the training set where that is below the accuracy a_train on all of it;
 2. the network is taken to tell 2C categories apart, majority and minority of each class;
 3. a random half of the majority samples get an adversarial copy: three steps of 1/255 by the sign
    of the gradient, towards the minority of their own class, within 0.6 of the sample.

Samples and copies together, drawn so that classes come equally often, are what is pasted by CutMix,
λ ~ Beta(1, 1), in a quarter of the steps; Table 2 has other shares, and MixUp in place of CutMix.

Where the paper is silent or contradicts itself:

- Eq. 2 calls samples *below* the threshold the majority, the text those *within* it, and cos(,) a
  "similarity distance". Read as a similarity, with the far ones as minority: as a distance 0.8
  would hardly ever be passed, since features after a ReLU have no angle above 90° between them.
- "PGD fine-tuned on the minority samples": PGD has nothing to fine-tune. What is fitted is the
  classifier that it attacks, a layer of 2C rows on the frozen embeddings, begun with the head's
  rows twice, under Balanced Softmax so that small minorities count; no minority, no copies.
- ε = 0.6 with three steps of 1/255: taken at their word, in units of the pixel range; the
  projection then never acts. No random start, which would be up to 0.6.
- Copies are made when they are drawn, by the network as it was at the last of those epochs: as if
  a data set were written anew every ten epochs, but that random crops come before the attack.
- Embedded is every sample once, as the data set serves it, augmentation included; oversampling
  would repeat samples without moving the class means.
- "CutMix to 25 % of the original long-tailed dataset with the new dataset": as in CMO's code, the
  long-tailed batch is the background, and the coin is thrown for each step. The loss stays
  Balanced Softmax with the long-tailed prior.
- No learning rate is given for the second stage: it falls from `finetune_lr` to 0 as a cosine.
- "While the training accuracy reaches 60 to 70 %" is taken to be the case after the first stage.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.meta.method import Order
from iada.methods.cmo import CMO, CMOOptions, ForegroundPool, Paste
from iada.methods.options import MethodRun
from iada.nn.functional import fused_loss
from iada.nn.priors import log_class_prior
from iada.utils.loading import batches, to_device
from iada.utils.seeds import seed_of
from iada.utils.settings import setting

THRESHOLD = 0.8
MIXINGS = ("cutmix", "mixup")  # Zhang et al., ICLR 2018, is the latter
EVERY = 10  # epochs
ATTACKED = 0.5  # of the majority samples
STEPS, STEP_SIZE, RADIUS = 3, 1 / 255, 0.6
FITTING_STEPS = 100  # of L-BFGS
STREAM = 0x616672  # keeps these draws apart from others of the same seed


def adaptive_thresholds(class_accuracy: Tensor, accuracy: Tensor) -> Tensor:
    """The least cosine of a majority sample, (C): a_c where it is below a_train, else 0.8.

    class_accuracy: a_c, (C), NaN for a class without samples. accuracy: a_train, ().
    """
    limit = torch.full_like(class_accuracy, THRESHOLD)
    return torch.where(class_accuracy < accuracy, class_accuracy, limit)


def minority_mask(embeddings: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Which samples are far from the mean of their class, (N) bool.

    Args:
        embeddings: (N, A).
        labels: (N) int64.
        thresholds: the least cosine of a majority sample, (C).
    """
    sums = embeddings.new_zeros(len(thresholds), embeddings.shape[1])
    sums.index_add_(0, labels, embeddings)  # the direction of the mean is that of the sum
    cosine = F.cosine_similarity(embeddings, sums[labels], dim=1)
    return cosine < thresholds[labels]


def fit_categories(categories: nn.Linear, embeddings: Tensor, targets: Tensor) -> None:
    """Fit a linear layer to tell apart `targets` (N) by embeddings (N, A), by Balanced Softmax."""
    counts = torch.bincount(targets, minlength=categories.out_features)
    prior = log_class_prior(counts).to(embeddings)
    search: dict[str, Any] = {"max_iter": FITTING_STEPS, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(categories.parameters(), **search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = categories.weight, categories.bias
        loss = fused_loss(embeddings, weight, bias, targets, log_prior=prior)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


def targeted_attack(
    logits: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, unit: Tensor | float = 1.0
) -> Tensor:
    """Projected gradient descent on CE(logits(x), targets), from `inputs` (N, ...) on.

    unit: what the inputs change when a pixel goes through its whole range, a number or (channels,
    1, 1).
    """
    moved = inputs.detach()
    for _ in range(STEPS):
        moved.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logits(moved), targets, reduction="sum")
        (grad,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() - STEP_SIZE * unit * grad.sign()
        moved = torch.clamp(moved, inputs - RADIUS * unit, inputs + RADIUS * unit)
    return moved


class AFR(CMO):
    """See above.

    Args:
        run: as in `CMO`. Its training set is what is embedded. If that has an attribute
            `deviation`, the numbers that pixels in [0, 1] were divided by, one a channel, the
            attack's step is 1/255 divided by them; otherwise the inputs are taken to be in [0, 1].
        finetune_epoch: first epoch of the second stage.
        mix_fraction: of the second stage's steps, those that mix images.
        mixing: how they do, one of MIXINGS.
    """

    def __init__(
        self,
        run: MethodRun,
        finetune_epoch: int,
        mix_fraction: float = 0.25,
        mixing: str = "cutmix",
    ) -> None:
        super().__init__(run, finetune_epoch)
        self.mix_fraction, self.mixing = mix_fraction, mixing
        self._second_stage = False
        assert run.train_set is not None
        self.train_set, self.finetune_epoch = run.train_set, finetune_epoch
        self.attacker = copy.deepcopy(run.backbone).eval().requires_grad_(False)
        sizes = run.head.in_features, 2 * run.head.out_features
        place: dict[str, Any] = {"device": run.head.weight.device, "dtype": run.dtype}
        self.categories = nn.utils.skip_init(nn.Linear, *sizes, **place)
        self._begin_categories()
        deviation = torch.as_tensor(getattr(run.train_set, "deviation", 1.0)).to(**place)
        self.unit = nn.Buffer(1 / deviation.view(-1, 1, 1), persistent=False)
        self.attacked = nn.Buffer(torch.zeros(len(self.labels), dtype=torch.bool))
        self.prepared_epoch = -1

    def begin_epoch(self, epoch: int, order: Order, first_step: int) -> Order:
        """The rows with the foregrounds'; every ten epochs of the second stage a new attacker."""
        stage_epoch = epoch - self.finetune_epoch
        self._second_stage = stage_epoch >= 0
        if not self._second_stage:
            return super().begin_epoch(epoch, order, first_step)
        if stage_epoch % EVERY == 0 and self.prepared_epoch != epoch:
            self._prepare(epoch)
        return self._plan(order, first_step, self.mix_fraction)

    @torch.no_grad()
    def _prepare(self, epoch: int) -> None:
        """Steps 1 to 3 of the second stage, up to the copies themselves."""
        head = self.head
        self.attacker.load_state_dict(self._learner.classifier.backbone.state_dict())
        embeddings = self._embeddings(epoch)
        labels = self.labels.to(embeddings.device)
        right = (F.linear(embeddings, *self._begin_categories()).argmax(dim=1) == labels).double()
        counts = torch.bincount(labels, minlength=head.out_features)
        class_accuracy = right.new_zeros(len(counts)).index_add_(0, labels, right) / counts
        thresholds = adaptive_thresholds(class_accuracy, right.mean())
        minority = minority_mask(embeddings, labels, thresholds)
        fit_categories(self.categories, embeddings, labels + len(counts) * minority)
        tails = torch.bincount(labels[minority], minlength=len(counts))
        majority = (~minority & (tails[labels] > 0)).cpu()
        rng = np.random.default_rng(seed_of(self.seed, STREAM, epoch))
        rows = rng.permutation(majority.nonzero()[:, 0].numpy())
        self.attacked.zero_()
        self.attacked[torch.from_numpy(rows[: round(ATTACKED * len(rows))])] = True
        self.prepared_epoch = epoch
        self._renew_pool()

    def _embeddings(self, epoch: int) -> Tensor:
        """Of every sample of the training set, (N, A), as it is served."""
        rows = [part.tolist() for part in torch.arange(len(self.labels)).split(512)]
        seed = seed_of(self.seed, STREAM, epoch)
        device, dtype = self.categories.weight.device, self.categories.weight.dtype
        loader = batches(self.train_set, rows, seed=seed)
        return torch.cat([self.attacker(to_device(b[0], device)).to(dtype) for b in loader])

    @torch.no_grad()
    def _begin_categories(self) -> tuple[Tensor, Tensor]:
        """The 2C rows become the head's twice; the head's weight and bias in their precision."""
        weight = self.head.weight.to(self.categories.weight.dtype)
        bias = weight.new_zeros(len(weight))
        if self.head.bias is not None:
            bias = self.head.bias.to(weight.dtype)
        self.categories.weight.copy_(weight.repeat(2, 1))
        self.categories.bias.copy_(bias.repeat(2))
        return weight, bias

    def _renew_pool(self) -> None:
        """All samples, and after them the copies."""
        rows = np.arange(len(self.labels))
        rows = np.concatenate([rows, self.attacked.nonzero()[:, 0].cpu().numpy()])
        self.pool = ForegroundPool(self.labels.numpy()[rows], rows)

    def _adversarial(self, places: np.ndarray) -> Sequence[int]:
        """Those foregrounds that are copies."""
        return np.flatnonzero(places >= len(self.labels)).tolist()

    def _foreground(self, inputs: Tensor, labels: Tensor, plan: Paste) -> Tensor:
        """The images, of which copies are attacked now."""
        if not plan.adversarial:
            return inputs
        places = to_device(torch.tensor(plan.adversarial), inputs.device)
        chosen = inputs[places]
        targets = labels[places].long() + self.head.out_features
        unit = self.unit.to(inputs.dtype)
        dtype = self.categories.weight.dtype
        moved = targeted_attack(
            lambda x: self.categories(self.attacker(x).to(dtype)), chosen, targets, unit
        )
        return inputs.index_copy(0, places, moved.to(inputs.dtype))

    def _mixed(self, images: Tensor, foreground: Tensor, plan: Paste) -> tuple[Tensor, float]:
        """By MixUp, (1 − λ) of the foreground all over the image, where that was asked for."""
        if self.mixing == "mixup" and self._second_stage:
            return torch.lerp(foreground, images, plan.rest), plan.rest
        return super()._mixed(images, foreground, plan)

    def get_extra_state(self) -> dict[str, Any]:
        """When the attacker was made."""
        return {"prepared_epoch": self.prepared_epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`, after the buffers are loaded."""
        self.prepared_epoch = state["prepared_epoch"]
        self._renew_pool()


@dataclass(frozen=True)
class AFROptions(CMOOptions):
    """AFR (Zhang et al., VISAPP 2024).

    finetune_epochs: the last epochs, AFR's second stage.
    finetune_lr: lr at its start, from which it falls to 0 as a cosine.
    mix_fraction: of its steps, those that mix images.  mixing: "cutmix" or "mixup".
    """

    finetune_epochs: int = setting(50, least=1)
    finetune_lr: float = setting(0.01, above=0)
    mix_fraction: float = setting(0.25, least=0, most=1)
    mixing: str = setting("cutmix", choices=MIXINGS)

    def build(self, run: MethodRun) -> AFR:
        epoch = run.epochs - self.finetune_epochs
        return AFR(run, epoch, self.mix_fraction, self.mixing)

    def last_stage(self) -> tuple[int, float]:
        return self.finetune_epochs, self.finetune_lr

    def shortened(self, share: float) -> "AFROptions":
        return replace(self, finetune_epochs=max(1, round(self.finetune_epochs * share)))
