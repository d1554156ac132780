"""Meta-IADA: one iteration of Algorithm 1.

    Eq. 7    φ̄ = φ − η₁ ∇_φ (1/n) Σ ℓ^IADA(φ; Σ, ε(f, Ω))            virtual step
    Eq. 8    Ω ← Ω − η₂ ∇_Ω (1/m) Σ ℓ^CE(φ̄)                          on the meta batch
    Eq. 9    Σ ← Σ − η₂ ∇_Σ (1/m) Σ ℓ^CE(φ̄)
    Eq. 10   φ ← φ − η₁ ∇_φ (1/n) Σ ℓ^IADA(φ; Σ, ε(f, Ω))            with the new Ω and Σ

ε and Σ enter through the last layer only. So with v = ∇_φ̄ of the meta loss and ḣ = J v, the
features' derivative along v, both hypergradients are closed forms in the head (`iada_kernels`, the
pass `hypergradient`), and no graph of a gradient is built. An iteration passes through the
backbone

    mode                              forwards    backwards    and
    hypergradient="jvp"                  2            3        ḣ: about one forward more, twice
                                                               its products and no BatchNorm
    the same with low_memory=True        3            3        ḣ, as above
    "finite-difference"                  4            3
    "double-backward"                    2            2        a backward through a backward: of
                                                               two forwards and two backwards
    scope=K                              2         1 and 2 of   ḣ: of the last K blocks
                                                   K blocks
    scope="head"                         2            1
    steps between, with interval=k       1            1

The training batch's features are computed once: the virtual step, ḣ and Eq. 10 share one graph,
so that dropout masks are the same in all three. With low_memory=True that graph is freed after the
virtual step and built again, from the same random state, for ḣ and Eq. 10.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iada.meta.bilevel import BilevelMethod
from iada.meta.closed_form_step import closed_form_step, inverse_rate, relative_change
from iada.meta.double_backward import double_backward
from iada.meta.epsilon import EpsilonScale, Observed, SampleEpsilon
from iada.meta.hypergradient import ForwardPass
from iada.meta.learner import HeadGradients, ShardedBatch, detached, linear
from iada.meta.method import HeadLoss
from iada.meta.options import DOUBLE_BACKWARD, MetaStepOptions, VirtualStep
from iada.meta.scope import Scope, moved_parameters
from iada.nn.characteristics import TrainingMemory, loss_and_margin
from iada.nn.class_covariance import ClassCovariance, labels_of_finite
from iada.nn.divergence import check_divergence
from iada.nn.functional import fused_loss
from iada.nn.perturbation_net import PerturbationNet
from iada.nn.priors import log_class_prior
from iada.nn.projection import (
    SemidefiniteSteps,
    nearest_positive_semidefinite,
    semidefinite_or_former,
)
from iada.utils.checks import argument_error, check_covariance, check_number, check_weights
from iada.utils.distributed import Group
from iada_kernels.contract import LossInputs
from iada_kernels.triangular import is_triangular, times_off_diagonal


class MetaIADA(BilevelMethod):
    """One iteration of the classifier φ, the perturbation network Ω and the covariances Σ.

    At the published rates a step of Eq. 9 moves Σ by some 1e-7 of itself and less, in proportion
    to both rates: docs/training.md.

    Examples:
        >>> meta = iada.MetaIADA(backbone, head, optimizer, torch.bincount(train_labels), alpha=0.1)
        >>> for batch, meta_batch in zip(loader, iada.endless(meta_loader)):
        ...     result = meta.step(batch, meta_batch)

    Under `torch.autocast` call `step` inside it: the backbone's forwards then run in its dtype, all
    else in float32. BatchNorm's running statistics move once an iteration, by the training batch.
    Random state moves as by one forward on the training batch and, if there is a meta step, one on
    the meta batch: passes that repeat draws leave no trace.

    A backbone under torch.compile has finite differences. Its graph is used twice: set
    torch._functorch.config.donated_buffer to False before it compiles, or use low_memory=True.

    Args:
        backbone: module from inputs to features (N, A).
        head: the last layer, nn.Linear(A, C).
        optimizer: any torch optimizer over the parameters of both that needs no closure.
            Parameters that are not in it, or ask for no gradient, stay as they are in every step.
        class_counts: training samples of each class, (C).
        perturbation: the network Ω; a new `PerturbationNet` by default.
        perturbation_optimizer: its optimizer; Adam at 1e-3 by default, as in the paper.
        epsilon: a number in place of Ω, the strength of all samples; 0 for no perturbation.
        covariance: a `ClassCovariance`; a new full one by default. Of a low-rank one Eq. 9 moves
            the diagonal and the factors, by their own gradients.
        class_weights: of each class, (C), by which Eq. 7 and 10 weigh their losses: Σ ω_y ℓ / Σ ω_y
            over the batch, as F.cross_entropy with a weight. None for the mean.
        memory: last epoch's values for the characteristics; by default one of class means only.
            Call `end_epoch()` after each epoch, and `check()`, which raises where training has
            diverged.
        alpha: of Eq. 6; a plain attribute, to be annealed.
        beta: of Eq. 6; likewise.
        covariance_lr: η₂ of Eq. 9; 0 leaves Σ as it is streamed, at no cost.
        epsilon_scale: ε is tanh's value, or `epsilon`, times this.
        epsilon_unit: "feature": as published, a coordinate moves by ε; "class-deviation": by
            ε √(tr Σ_y / A), a typical deviation of a coordinate within the class, which no
            derivative passes through.
        log_proportion: Ω sees log π_y in place of π_y, which keeps small classes apart.
        rate_free_perturbation: the gradient of Eq. 8 divided by the head's learning rate η₁, a
            factor of it, which falls with the rate. (One that is a tensor on a GPU is read back.)
        rate_free_covariance: the same of Eq. 9, which hardly moves Σ with the factor.
        persistent: keep what Eq. 9 does to Σ; False uses it for Eq. 10 only, as MetaSAug does.
        keep_semidefinite: a class whose Σ Eq. 9 would make indefinite, beyond rounding, keeps the
            former one (a single variance of the diagonal does, in the other structures); `held`
            counts how often. An indefinite Σ rewards the classifier without bound for growing.
            Costs a Cholesky factorization a class, of a full Σ. False is Eq. 9 as published.
        project: in place of that move Σ to the nearest positive semidefinite matrix, by
            eigenvalues; `projections` counts the classes for which that changed something.
        clip_norm: largest norm of the gradient in Eq. 10, 0 for no clipping.
        hypergradient: "jvp", exact; a backbone that has no forward-mode derivative somewhere goes
            over to finite differences, and one line in the log "iada" names the layer.
            "finite-difference": ḣ by two forwards, off by 0.1 to 4 %. "double-backward": the
            oracle, for a single process without a GradScaler.
        scope: which parameters the virtual step moves; the hypergradient is exact for that step.
            "full": all. "head": the last layer only, as MetaSAug does on large data. A number K:
            the head and the last K blocks of the backbone, its children with parameters
            (Sequential and ModuleList taken apart): the first two backwards end there, and ḣ
            begins there.
        interval: a meta step (Eq. 7 to 9) every so many iterations, the first one included.
        low_memory: hold one graph of the backbone at a time, as a plain step does, for one forward
            more. Not for "double-backward".
        virtual_momentum: the virtual step has the momentum of the optimizer, a torch.optim.SGD.
        virtual_weight_decay: and its weight decay. By default it is plain SGD at the learning rate
            that each parameter has in the optimizer.
        scaler: torch.amp.GradScaler for float16; `step` scales, steps and updates it.
        process_group: of torch.distributed, whose processes share each batch, every one with its
            rows; the classifier as it is, not wrapped in DistributedDataParallel. They end each
            step with the same parameters, Ω and Σ, and these are what one process with the
            whole batch gets, to rounding. Start them equal: `iada.utils.distributed.broadcast`.
            Features (N, A) are gathered and the head is computed everywhere; BatchNorm layers in
            the backbone see their process's rows.
    """

    covariance: ClassCovariance
    class_weights: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        class_counts: Tensor,
        *,
        perturbation: PerturbationNet | None = None,
        perturbation_optimizer: torch.optim.Optimizer | None = None,
        epsilon: float | None = None,
        covariance: ClassCovariance | None = None,
        class_weights: Tensor | None = None,
        memory: TrainingMemory | None = None,
        alpha: float = 0.5,
        beta: float = 1.0,
        covariance_lr: float = 1e-3,
        epsilon_scale: float = 1.0,
        epsilon_unit: str = "feature",
        log_proportion: bool = False,
        rate_free_perturbation: bool = False,
        rate_free_covariance: bool = False,
        persistent: bool = True,
        keep_semidefinite: bool = True,
        project: bool = False,
        clip_norm: float = 0.0,
        hypergradient: str = "jvp",
        scope: Scope = "full",
        interval: int = 1,
        low_memory: bool = False,
        virtual_momentum: bool = False,
        virtual_weight_decay: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        process_group: Group = None,
    ) -> None:
        virtual = VirtualStep(virtual_momentum, virtual_weight_decay)
        options = MetaStepOptions(hypergradient, scope, interval, low_memory, virtual)
        common = {"clip_norm": clip_norm, "scaler": scaler, "process_group": process_group}
        super().__init__(backbone, head, optimizer, options, **common)
        scaler = self._learner.scaler
        if low_memory or process_group is not None or scaler.is_enabled():
            remedy = "leave these out: double backward is the oracle of the other two"
            self.options.refuse_double_backward("with low_memory, process_group or scaler", remedy)
        self._passes.math_attention = hypergradient == DOUBLE_BACKWARD
        num_classes, width = head.weight.shape
        device, dtype = head.weight.device, torch.promote_types(torch.float32, head.weight.dtype)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        log_prior = log_class_prior(class_counts, num_classes).to(**place)
        if class_weights is not None:
            check_weights("class_weights", class_weights, num_classes, always=True)
            class_weights = class_weights.detach().to(**place, copy=True)
        self.register_buffer("class_weights", class_weights, persistent=False)
        if covariance is not None and not isinstance(covariance, ClassCovariance):
            got, remedy = f"a {type(covariance).__name__}", "it holds the statistics of Eq. 6"
            raise argument_error("covariance", "an iada.ClassCovariance", got, remedy)
        self.covariance = covariance or ClassCovariance(num_classes, width, **place)
        check_covariance(self.covariance.covariance, num_classes, width)
        self.memory = memory or TrainingMemory(num_classes, **place)
        self.memory.check_classes(num_classes)
        check_number("covariance_lr", covariance_lr, 0.0, "0 leaves Σ as it is streamed")
        self.alpha, self.beta, self.covariance_lr = alpha, beta, covariance_lr
        self.rate_free_perturbation = rate_free_perturbation
        self.rate_free_covariance = rate_free_covariance
        self.persistent, self.project = persistent, project
        self.keep_semidefinite = keep_semidefinite
        source = (perturbation, perturbation_optimizer, epsilon)
        scale = EpsilonScale(epsilon_scale, epsilon_unit)
        self.sample_epsilon = SampleEpsilon(*source, scale, log_prior, scaler, log_proportion)
        counter = torch.zeros((), dtype=torch.int64, device=device)
        self.held, self.projections = nn.Buffer(counter), nn.Buffer(counter.clone())
        self.unchecked = nn.Buffer(torch.zeros(num_classes, **place), persistent=False)
        self.covariance_change = nn.Buffer(torch.full((), torch.nan, **place))
        self._change_measured = False

    @property
    def num_samples(self) -> int:
        """The memory's."""
        return len(self.memory.samples)

    @property
    def log_prior(self) -> Tensor:
        """log π, (C)."""
        return self.sample_epsilon.log_prior

    @property
    def perturbation(self) -> PerturbationNet | None:
        """The network Ω."""
        return self.sample_epsilon.perturbation

    @property
    def _learns(self) -> bool:
        """False with a constant or frozen Ω and covariance_lr 0: no step makes a meta step then."""
        return bool(self.covariance_lr or self.sample_epsilon.trained())

    @property
    def needs_meta_batch(self) -> bool:
        """Whether the next `step` makes a meta step: with interval=k one in k, if any does."""
        return self._learns and super().needs_meta_batch

    def meta_steps(self, count: int) -> Sequence[bool]:
        """Which of the next `count` steps make a meta step."""
        return super().meta_steps(count) if self._learns else [False] * count

    def observe(self, forward: ForwardPass) -> Observed:
        """Σ takes in the batch; the characteristics that Ω sees."""
        self.sample_epsilon.check_optimizer()
        features, labels = forward.global_features, forward.rows.labels
        if self._learner.scaler.is_enabled():  # float16 overflows now and then
            labels = labels_of_finite(features, labels)
        self.covariance.update_gathered(features, labels)
        return self.sample_epsilon.observe(forward, self.head, self.memory, self.covariance)

    def cross_entropy_step(self, batch: Sequence[Any]) -> Tensor:
        """One iteration of the first phase (Algorithm 1, lines 2–5): plain CE. The loss, detached.

        Records losses and margins for the characteristics; Σ is left to the second phase.
        """
        rows = self._shard(batch)

        def mean_loss(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            losses, margin = loss_and_margin(linear(features, weight, bias), rows.labels)
            self.memory.record(losses.detach(), margin.detach(), rows.labels, rows.index)
            return losses.mean()

        return self._supervised_step(rows, mean_loss)

    def end_epoch(self) -> None:
        """To be called after each epoch: its losses and margins become the last epoch's."""
        self.memory.end_epoch()
        self.covariance_change.fill_(torch.nan)
        self._change_measured = False

    def check(self) -> None:
        """FloatingPointError if training has diverged; see `iada.check_divergence`."""
        check_divergence(self.head, self.covariance, self.alpha)

    def get_extra_state(self) -> dict[str, Any]:
        """Where the iterations stand."""
        own = {"change_measured": self._change_measured, "unchecked": self.unchecked.clone()}
        return {**super().get_extra_state(), **own}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        super().set_extra_state(state)
        self._change_measured = state["change_measured"]
        self.unchecked.copy_(state.get("unchecked", self.unchecked.new_zeros(())))

    def meta_step(
        self, forward: ForwardPass, observed: Observed, meta_rows: ShardedBatch
    ) -> tuple[Tensor, Observed]:
        """Eq. 7 to 9: moves Ω and Σ.

        Of a shrunk Σ a class's own part moves, by its share of the gradient; S is a constant.
        """
        seen, state = observed.sigma, self.covariance
        former = None if self._change_measured else seen.clone()
        epsilon = self.sample_epsilon.differentiable(observed)
        if self.options.hypergradient == DOUBLE_BACKWARD:
            features = forward.features
            sigma = self._by_double_backward(forward, epsilon, meta_rows, seen)
        else:
            features, sigma = self._by_closed_form(forward, epsilon, meta_rows, seen)
        if state.shrinkage:
            share = state.class_share().view(-1, *[1] * (sigma.dim() - 1))
            sigma = state.covariance + share * (sigma - seen)
        sigma = state.shrunk(self._keep(sigma))
        if former is not None:
            self.covariance_change.copy_(relative_change(sigma, former, self.head.in_features))
            self._change_measured = True
        return features, observed._replace(sigma=sigma)

    def training_gradients(
        self, forward: ForwardPass, observed: Observed, after_meta_step: bool
    ) -> tuple[Tensor, HeadGradients, Tensor | None]:
        """Eq. 10's, with the new Ω and Σ."""
        epsilon = self.sample_epsilon.values(observed, moves_buffers=not after_meta_step)
        return *self._head_gradients(forward, observed.sigma, epsilon), epsilon

    def _by_closed_form(
        self, forward: ForwardPass, epsilon: Tensor | None, meta_rows: ShardedBatch, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Eq. 7 to 9 by the head's closed forms: the features to go on with, and Σ."""
        head = self.head
        constant = None if epsilon is None else epsilon.detach()
        _, gradients = self._head_gradients(forward, sigma, constant)
        meta = self._meta_passes.run(forward, gradients, meta_rows)
        self._meta_loss = meta.meta_loss
        tensors = (*detached(head), forward.rows.labels, sigma, constant, self.log_prior)
        inputs = LossInputs(forward.global_features, *tensors)
        scaled = self._learner.scaler.is_enabled()
        guarded = self.keep_semidefinite and not self.project
        guarded = guarded and self.covariance.structure == "full"
        guard = SemidefiniteSteps(self.unchecked, self.held) if guarded else None
        grad_epsilon, sigma = closed_form_step(
            inputs,
            alpha=float(self.alpha),
            beta=float(self.beta),
            tangents=meta.tangents,
            class_weights=self.class_weights,
            covariance_lr=self._covariance_step_size(),
            in_place=sigma is self.covariance.covariance
            and self.persistent
            and not scaled
            and (guard is not None or not self.keep_semidefinite),
            guard=guard,
            skip_overflow=scaled,
        )
        if grad_epsilon is not None and self.rate_free_perturbation:
            grad_epsilon = grad_epsilon * inverse_rate(self.optimizer, head.weight)
        self.sample_epsilon.learn(epsilon, grad_epsilon, self._learner.scale())
        return meta.features, sigma

    def _by_double_backward(
        self, forward: ForwardPass, epsilon: Tensor | None, meta_rows: ShardedBatch, sigma: Tensor
    ) -> Tensor:
        """Eq. 7 to 9 by the oracle: Σ."""
        head, features = self.head, forward.features
        backbone = self._learner.classifier.backbone
        trained = moved_parameters(backbone, head, self._learner.trained(), self.options.scope)
        if not self.options.moves_backbone:
            features = features.detach()
        sigma = sigma.clone().requires_grad_()
        loss = self._loss(sigma, epsilon, forward.rows.labels)(features, head.weight, head.bias)
        wanted = [sigma, *self.sample_epsilon.trained()]
        step = (self.optimizer, self.options.virtual)
        self._meta_loss, (grad_sigma, *grads) = double_backward(
            loss, wanted, trained, *step, self._passes, head, meta_rows
        )
        if self.rate_free_perturbation:
            factor = inverse_rate(self.optimizer, head.weight)
            grads = [grad * factor for grad in grads]
        self.sample_epsilon.step(grads, self._learner.scale())
        if is_triangular(sigma, head.in_features):
            grad_sigma = times_off_diagonal(grad_sigma, head.in_features, 0.5)
        elif sigma.dim() == 3:
            grad_sigma = (grad_sigma + grad_sigma.mT) / 2
        return sigma.detach() - self._covariance_step_size() * grad_sigma

    def _covariance_step_size(self) -> float:
        """η₂ of Eq. 9, or η₂/η₁."""
        if not self.rate_free_covariance:
            return self.covariance_lr
        return self.covariance_lr * inverse_rate(self.optimizer, self.head.weight)

    @torch.no_grad()
    def _keep(self, sigma: Tensor) -> Tensor:
        """Σ after Eq. 9, on demand positive semidefinite, and kept if it is to persist."""
        if self.project:
            sigma, changed = nearest_positive_semidefinite(sigma, self.head.in_features)
            self.projections.add_(changed)
        elif self.keep_semidefinite and sigma is not self.covariance.covariance:
            width = self.head.in_features
            sigma, back = semidefinite_or_former(sigma, self.covariance.covariance, width)
            self.held.add_(back)
        if self.persistent and sigma is not self.covariance.covariance:
            self.covariance.covariance.copy_(sigma)
        return sigma

    def _head_gradients(
        self, forward: ForwardPass, sigma: Tensor, epsilon: Tensor | None
    ) -> tuple[Tensor, HeadGradients]:
        """Eq. 6 and its gradients by features and head."""
        loss = self._loss(sigma, epsilon, forward.rows.labels)
        return self._learner.head_gradients(loss, forward.global_features)

    def _loss(self, sigma: Tensor, epsilon: Tensor | None, labels: Tensor) -> HeadLoss:
        """Eq. 6 over the batch as a function of the features and the head."""
        terms: dict[str, Any] = {"covariance": sigma, "epsilon": epsilon}
        terms |= {"log_prior": self.log_prior, "class_weight": self.class_weights}
        terms |= {"alpha": self.alpha, "beta": self.beta}
        return lambda features, weight, bias: fused_loss(features, weight, bias, labels, **terms)
