"""RISDA: implicit augmentation that borrows from the classes that a class is taken for.

Chen et al., "Imagine by Reasoning: A Reasoning-Based Implicit Semantic Data Augmentation for
Long-Tailed Classification", AAAI 2022. After epochs of plain CE the training set gives prototypes
μ_c, covariances Σ_c and the confusion matrix K, whose row c has the shares of class c that are
taken for each class. Then, with ω the class-balanced weights and t the share of the run that is
over,

    z̃_j  = w_j·(h + t a μ̃_y) + b_j + t β ½ (w_j − w_y)ᵀ Σ̃_y (w_j − w_y)
    loss = Σ ω_y CE(z̃, y) / Σ ω_y
    μ̃_c  = Σ_k K_ck μ_k − μ_c,   Σ̃_c = Σ_k K_ck Σ_k for tail classes, Σ_c for head classes

which is ISDA's loss of displaced features, so that `fused_loss` has it in closed form.

Of the authors' code (xiaohua-chen/RISDA, RISDA.py and loss.py) are: 160 of 200 epochs of CE, the
form of μ̃, Σ̃ and z̃, t = epoch / epochs, ω with β = 0.9999, Σ streamed on from the second stage's
features, the 20 largest of 100 classes as head (`head_share`), μ for all classes and in evaluation
mode. In CIFAR's code the displacement is added to the features and once more to the logits, which
is a = 2 α in its notation: α = 0.5, β = 0.75 for CIFAR100 at 100:1 are the defaults. ImageNet's
has α = 0, β = 7.5, and the 385 classes with more than 100 images as head.

Chosen here, where the code differs from the paper's description or from itself, or is silent:

- K and Σ are of one pass over the training set between the stages. The code takes K of the epoch
  with the best training accuracy, rounds it to two digits, and starts Σ at 0.
- Σ̃ is made of the streamed Σ at each step. The code writes it back into what is streamed, so that
  it is mixed again and again.
- Σ is of the features as they are; the code's are displaced, which changes no covariance.
- All of the network goes on learning. The code means to freeze the backbone (ImageNet's from epoch
  90 on), but for CIFAR its loop over the parameters finds none.
- A class without training images keeps its own Σ, and has no displacement.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iada.meta.method import Order
from iada.methods.head_loss import HeadLossMethod
from iada.methods.options import MethodOptions, MethodRun
from iada.nn.class_covariance import ClassCovariance
from iada.nn.functional import fused_loss
from iada.nn.priors import checked_counts, class_balanced_weights
from iada.utils.distributed import broadcast
from iada.utils.evaluate import by_batch
from iada.utils.settings import setting

STRUCTURES = ("full", "diag")  # of which a mixture has the same structure


def tail_classes(class_counts: Tensor, head_share: float) -> Tensor:
    """All but the `head_share` largest classes, (C) bool; of equal ones the first are larger."""
    order = checked_counts(class_counts).argsort(descending=True, stable=True)
    tail = torch.ones(len(order), dtype=torch.bool)
    tail[order[: round(head_share * len(order))].cpu()] = False
    return tail


class RISDA(HeadLossMethod):
    """See above.

    Args:
        run: what it is built for; its training set is what prototypes and K are of.
        covariance: Σ, full or diagonal.
        covariance_scale: β.
        prototype_scale: a.
        head_share: of the classes, the largest, those whose Σ̃ is their own.
        class_beta: β of the class-balanced weights.

    Attributes:
        mixing: from Σ to Σ̃, (C, C): K's rows of the tail classes, else the identity's.
        displacement: μ̃, (C, A).
    """

    covariance: ClassCovariance

    def __init__(
        self,
        run: MethodRun,
        covariance: ClassCovariance,
        covariance_scale: float = 0.75,
        prototype_scale: float = 1.0,
        head_share: float = 0.2,
        class_beta: float = 0.9999,
    ) -> None:
        super().__init__(run, covariance=covariance, alpha=covariance_scale)
        assert run.train_set is not None
        self.train_set, self.num_workers, self.seed = run.train_set, run.num_workers, run.seed
        self.epochs, self.prepared = run.epochs, False
        self.covariance_scale, self.prototype_scale = covariance_scale, prototype_scale
        self.shift = prototype_scale
        weights = class_balanced_weights(run.class_counts, class_beta).to(self.log_prior)
        self.class_weights = nn.Buffer(weights, persistent=False)
        tail = tail_classes(run.class_counts, head_share).to(self.log_prior.device)
        self.tail = nn.Buffer(tail, persistent=False)
        self.mixing = nn.Buffer(torch.eye(len(tail)).to(self.log_prior))
        self.displacement = nn.Buffer(torch.zeros_like(covariance.mean))

    def begin_epoch(self, epoch: int, order: Order, first_step: int) -> Order:
        """The rows as they are."""
        share = epoch / self.epochs
        self.alpha, self.shift = share * self.covariance_scale, share * self.prototype_scale
        return order

    @torch.no_grad()
    def prepare(self) -> None:
        """Once, Σ, K and μ̃ of the training set as it is served, by the network as it is."""
        if self.prepared:
            return
        classes, head = len(self.mixing), self.head
        confusion = torch.zeros_like(self.mixing).flatten()
        parts = (self.classifier.backbone, head, self.train_set)
        batches = by_batch(*parts, num_workers=self.num_workers, seed=self.seed)
        for features, logits, labels in batches:
            self.covariance.update_gathered(features, labels)
            cells = classes * labels + logits.argmax(dim=1)
            confusion.index_add_(0, cells, torch.ones_like(cells, dtype=confusion.dtype))
        confusion = confusion.view(classes, classes)
        total = confusion.sum(dim=1, keepdim=True)
        identity = torch.eye(classes).to(confusion)
        relations = torch.where(total > 0, confusion / total.clamp(min=1), identity)
        prototypes = self.covariance.mean
        self.displacement.copy_(relations @ prototypes - prototypes)
        self.mixing.copy_(torch.where(self.tail[:, None], relations, identity))
        broadcast([self.mixing, self.displacement, *self.covariance.buffers()], self._learner.group)
        self.prepared = True

    def loss(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """The weighted mean over the batch."""
        self.covariance.update_gathered(features, labels)
        displaced, mixed = self.seen_by_loss(features, labels)
        terms: dict[str, Any] = {"covariance": mixed, "alpha": self.alpha}
        return fused_loss(displaced, weight, bias, labels, **terms, class_weight=self.class_weights)

    def seen_by_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """h + t a μ̃_y, and Σ̃."""
        sigma = self.covariance.covariance
        mixed = (self.mixing @ sigma.flatten(1)).view_as(sigma)
        return features + self.shift * self.displacement[labels].to(features.dtype), mixed

    def get_extra_state(self) -> dict[str, Any]:
        """Whether the pass between the stages was made, and the scales of the epoch."""
        return {"prepared": self.prepared, "alpha": self.alpha, "shift": self.shift}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.prepared, self.alpha, self.shift = (state[n] for n in ("prepared", "alpha", "shift"))


@dataclass(frozen=True)
class RISDAOptions(MethodOptions):
    """RISDA (Chen et al., AAAI 2022).

    covariance_scale, prototype_scale: β and a (twice the α of its code), at the end of the run.
    head_share: of the classes, the largest, those that borrow no covariance.
    class_beta: β of the class-balanced weights.
    structure: of the covariance, "full" or "diag".
    """

    ce_fraction: ClassVar[float] = 0.8
    covariance_scale: float = setting(0.75, least=0)
    prototype_scale: float = setting(1.0, least=0)
    head_share: float = setting(0.2, least=0, most=1)
    class_beta: float = setting(0.9999, least=0, below=1)
    structure: str = setting("full", choices=STRUCTURES)

    @property
    def counts_epochs(self) -> bool:
        return True

    def build(self, run: MethodRun) -> RISDA:
        covariance = run.covariance(self.structure, 0, 0.0)
        scales = self.covariance_scale, self.prototype_scale
        return RISDA(run, covariance, *scales, self.head_share, self.class_beta)
