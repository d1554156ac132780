"""Meta-IADA: one iteration of Algorithm 1.

    Eq. 7    φ̄ = φ − η₁ ∇_φ (1/n) Σ ℓ^IADA(φ; Σ, ε(f, Ω))            virtual step
    Eq. 8    Ω ← Ω − η₂ ∇_Ω (1/m) Σ ℓ^CE(φ̄)                          on the meta batch
    Eq. 9    Σ ← Σ − η₂ ∇_Σ (1/m) Σ ℓ^CE(φ̄)
    Eq. 10   φ ← φ − η₁ ∇_φ (1/n) Σ ℓ^IADA(φ; Σ, ε(f, Ω))            with the new Ω and Σ

The gradients of Eq. 8 and 9 go through the virtual step by double backward, which is exact for
every backbone that autograd can differentiate twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from iada.baselines import descend
from iada.covariance import ClassCovariance
from iada.loss import fused_loss
from iada.perturbation import PerturbationNet
from iada.prior import log_class_prior
from iada.sample_characteristics import TrainingMemory, characteristics, loss_and_margin
from iada.validation import (
    check_label_values,
    check_labels,
    check_tensor,
    complain,
    values_are_checked,
)


@dataclass(frozen=True)
class MetaStep:
    """What one iteration did, as detached tensors: reading one waits for its device.

    loss: Eq. 10's loss before its step, (). meta_loss: CE at φ̄, (). epsilon: the strengths of
    Eq. 10, (N).
    """

    loss: Tensor
    meta_loss: Tensor
    epsilon: Tensor


class Classifier(nn.Module):
    """Backbone and head as one module that gives features (N, A) and logits (N, C)."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Features h (N, A) and logits z = Wh + b (N, C)."""
        features = self.backbone(inputs)
        return features, self.head(features)


class MetaIADA:
    """Learns the classifier φ, the perturbation network Ω and the covariances Σ together.

    >>> meta = iada.MetaIADA(backbone, head, optimizer, class_counts)
    >>> for batch, meta_batch in zip(train_loader, meta_stream):
    ...     meta.step(batch, meta_batch)

    Args:
        backbone: module from inputs to features (N, A).
        head: the last layer, nn.Linear(A, C).
        optimizer: any torch optimizer over the parameters of both; the virtual step is plain SGD
            at the learning rate that each parameter has there.
        class_counts: training samples of each class, (C).
        perturbation: the network Ω; a new `PerturbationNet` by default.
        perturbation_optimizer: its optimizer; Adam at 1e-3 by default, as in the paper.
        covariance: a `ClassCovariance`; a new full one by default.
        memory: last epoch's values for the characteristics; by default one of class means only.
            Call `memory.end_epoch()` after each epoch.
        alpha, beta: of Eq. 6; plain attributes, to be annealed.
        covariance_lr: η₂ of Eq. 9.
        persistent: keep what Eq. 9 does to Σ; False uses it for Eq. 10 only, as MetaSAug does.
        project: after Eq. 9, move Σ to the nearest positive semidefinite matrix;
            `projections` counts the classes for which that changed something.
        clip_norm: largest norm of the gradient in Eq. 10, 0 for no clipping.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        class_counts: Tensor,
        *,
        perturbation: PerturbationNet | None = None,
        perturbation_optimizer: torch.optim.Optimizer | None = None,
        covariance: ClassCovariance | None = None,
        memory: TrainingMemory | None = None,
        alpha: float = 0.5,
        beta: float = 1.0,
        covariance_lr: float = 1e-3,
        persistent: bool = True,
        project: bool = False,
        clip_norm: float = 0.0,
    ) -> None:
        if not isinstance(head, nn.Linear):
            raise complain(
                "head",
                "the classifier's last layer, an nn.Linear",
                f"a {type(head).__name__}",
                "split the model into a backbone that returns features and its last nn.Linear",
            )
        num_classes, width = head.weight.shape
        device, dtype = head.weight.device, torch.promote_types(torch.float32, head.weight.dtype)
        self.classifier = Classifier(backbone, head)
        self.optimizer = optimizer
        self.log_prior = log_class_prior(class_counts, num_classes).to(device, dtype)
        self.perturbation = perturbation or PerturbationNet().to(device, dtype)
        self.perturbation_optimizer = perturbation_optimizer or torch.optim.Adam(
            self.perturbation.parameters(), lr=1e-3
        )
        self.covariance = covariance or ClassCovariance(num_classes, width).to(device, dtype)
        self.memory = memory or TrainingMemory(num_classes).to(device, dtype)
        self.alpha, self.beta = alpha, beta
        self.covariance_lr = covariance_lr
        self.persistent, self.project = persistent, project
        self.clip_norm = clip_norm
        self.projections = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, batch: Sequence[Any], meta_batch: Sequence[Any]) -> MetaStep:
        """One iteration of Algorithm 1.

        Args:
            batch: (inputs, labels) or (inputs, labels, index), index (N) the samples' places in
                the training set.
            meta_batch: (inputs, labels), of any size.
        """
        inputs, labels, index = self._checked("batch", batch)
        meta_batch = self._checked("meta_batch", meta_batch)[:2]
        head = self.classifier.head
        features, logits = self.classifier(inputs)
        self.covariance.update(features, labels)
        traits = characteristics(
            features, logits, labels, head.weight, self.log_prior, self.memory, index
        )
        self.memory.record(traits[:, 0], traits[:, 1], labels, index)

        sigma = self.covariance.covariance.clone().requires_grad_()
        epsilon = self.perturbation(traits)
        loss = self._loss(features, labels, sigma, epsilon)
        meta_loss = self._meta_loss(loss, meta_batch)
        if values_are_checked(meta_loss.device) and not torch.isfinite(meta_loss):
            raise complain(
                "meta_batch",
                "a finite cross-entropy after the virtual step",
                str(float(meta_loss.detach())),
                "look for bad numbers in its inputs, or lower lr",
            )
        omega = list(self.perturbation.parameters())
        *grad_omega, grad_sigma = torch.autograd.grad(meta_loss, [*omega, sigma])
        for parameter, grad in zip(omega, grad_omega, strict=True):
            parameter.grad = grad
        self.perturbation_optimizer.step()
        sigma = self._step_covariance(sigma.detach(), grad_sigma)

        with torch.no_grad():
            epsilon = self.perturbation(traits)
        loss = self._loss(features, labels, sigma, epsilon)
        descend(self.optimizer, loss, self.clip_norm)
        return MetaStep(loss.detach(), meta_loss.detach(), epsilon)

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """One iteration of the first phase (Algorithm 1, lines 2–5): plain CE. The loss, detached.

        Records losses and margins for the characteristics; Σ is left to the second phase.
        """
        inputs, labels, index = self._checked("batch", batch)
        _, logits = self.classifier(inputs)
        losses, margin = loss_and_margin(logits, labels)
        self.memory.record(losses.detach(), margin.detach(), labels, index)
        loss = losses.mean()
        descend(self.optimizer, loss, self.clip_norm)
        return loss.detach()

    def _checked(self, name: str, batch: Sequence[Any]) -> tuple[Any, Tensor, Tensor | None]:
        """(inputs, int64 labels, index or None), before anything is changed."""
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            expected = "(inputs, labels) or (inputs, labels, index)"
            raise complain(name, expected, f"a {type(batch).__name__}", "pass a tuple")
        inputs, labels, *rest = batch
        index = rest[0] if rest else None
        check_tensor("labels", labels, f"the class indices of {name}")
        check_labels(labels, len(labels))
        labels = labels.long()
        if values_are_checked(labels.device):
            check_label_values(labels, self.classifier.head.out_features, None)
            if index is not None and len(self.memory.samples) and len(index):
                low, high = index.aminmax()
                if low < 0 or high >= len(self.memory.samples):
                    raise complain(
                        f"{name} index",
                        f"places in [0, {len(self.memory.samples)}), the memory's num_samples",
                        f"{int(low)} to {int(high)}",
                        "build TrainingMemory for the whole training set",
                    )
        return inputs, labels, index

    def state_dict(self) -> dict[str, Any]:
        """Ω, its optimizer, Σ with its statistics, and the memory; not the classifier's part."""
        return {
            "perturbation": self.perturbation.state_dict(),
            "perturbation_optimizer": self.perturbation_optimizer.state_dict(),
            "covariance": self.covariance.state_dict(),
            "memory": self.memory.state_dict(),
            "projections": self.projections,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.perturbation.load_state_dict(state["perturbation"])
        self.perturbation_optimizer.load_state_dict(state["perturbation_optimizer"])
        self.covariance.load_state_dict(state["covariance"])
        self.memory.load_state_dict(state["memory"])
        self.projections.copy_(state["projections"])

    def _loss(self, features: Tensor, labels: Tensor, sigma: Tensor, epsilon: Tensor) -> Tensor:
        head = self.classifier.head
        return fused_loss(
            features,
            head.weight,
            head.bias,
            labels,
            covariance=sigma,
            epsilon=epsilon,
            log_prior=self.log_prior,
            alpha=self.alpha,
            beta=self.beta,
        )

    def _meta_loss(self, loss: Tensor, meta_batch: Sequence[Any]) -> Tensor:
        """CE on the meta batch at φ̄ of Eq. 7, as a function of Ω and Σ."""
        rates = {
            id(parameter): group["lr"]
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }
        trained = {
            name: parameter
            for name, parameter in self.classifier.named_parameters()
            if parameter.requires_grad and id(parameter) in rates
        }
        grads = torch.autograd.grad(
            loss, list(trained.values()), create_graph=True, allow_unused=True
        )
        virtual = {
            name: parameter if grad is None else parameter - rates[id(parameter)] * grad
            for (name, parameter), grad in zip(trained.items(), grads, strict=True)
        }
        # Running statistics belong to the training batch: the virtual pass gets copies.
        buffers = {name: buffer.clone() for name, buffer in self.classifier.named_buffers()}
        inputs, labels = meta_batch[0], meta_batch[1]
        _, logits = functional_call(self.classifier, (virtual, buffers), (inputs,))
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def _step_covariance(self, sigma: Tensor, grad: Tensor) -> Tensor:
        """Eq. 9, symmetric and on demand positive semidefinite."""
        full = sigma.dim() == 3
        sigma = sigma - self.covariance_lr * grad
        if full:
            sigma = (sigma + sigma.mT) / 2
        if self.project:
            sigma, changed = nearest_positive_semidefinite(sigma)
            self.projections += changed
        if self.persistent:
            self.covariance.covariance.copy_(sigma)
        return sigma


def nearest_positive_semidefinite(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Σ with its negative eigenvalues at 0, and the number of classes that had any beyond rounding.

    covariance (C, A, A), symmetric, or variances (C, A). A class without negative eigenvalues
    keeps its bits.
    """
    if covariance.dim() == 2:
        return covariance.clamp(min=0), (covariance < 0).any(dim=1).sum()
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values.abs().amax(dim=1) * values.shape[1] * torch.finfo(values.dtype).eps
    negative = values[:, 0] < -rounding
    clamped = (vectors * values.clamp(min=0)[:, None, :]) @ vectors.mT
    return torch.where(negative[:, None, None], clamped, covariance), negative.sum()
