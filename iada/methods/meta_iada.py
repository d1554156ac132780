"""Meta-IADA, and MetaSAug as a case of it: their options in a run."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from iada.meta.epsilon import EPSILON_UNITS
from iada.meta.meta_iada import MetaIADA
from iada.methods.options import BilevelOptions, CovarianceOptions, MethodRun
from iada.nn.characteristics import CHARACTERISTICS, TrainingMemory
from iada.nn.perturbation_net import PerturbationNet
from iada.nn.priors import class_balanced_weights, log_class_prior
from iada.utils.checks import argument_error
from iada.utils.settings import setting

PERTURBATIONS = ("learned", "untrained", "constant")
PERTURBATION_INITS = ("default", "zero")


@dataclass(frozen=True)
class LearnedCovarianceOptions(BilevelOptions, CovarianceOptions):
    """Of the methods whose Σ a meta step moves.

    Args:
        covariance_lr: η₂ of Eq. 9. With 0, and no Ω to be learned, there is no meta step: an
            iteration costs what a plain one does.
        rate_free_covariance: see `MetaIADA`.
        keep_semidefinite: see `MetaIADA`.
        project: see `MetaIADA`.
    """

    ce_fraction: ClassVar[float] = 0.8  # published with a phase of plain CE before them
    covariance_lr: float = setting(1e-3, least=0)
    rate_free_covariance: bool = False
    keep_semidefinite: bool = True
    project: bool = False

    @property
    def meta_learns(self) -> bool:
        return self.covariance_lr > 0

    def engine(self, run: MethodRun, **own: Any) -> MetaIADA:
        """`MetaIADA` with these options and `own`."""
        memory = TrainingMemory(run.head.out_features, len(run.train_set))  # type: ignore[arg-type]
        shared = [field.name for field in fields(LearnedCovarianceOptions)]
        options = {name: getattr(self, name) for name in shared}
        for name in ("alpha_ramp", "structure", "rank", "shrinkage"):
            del options[name]
        return MetaIADA(
            class_counts=run.class_counts,
            covariance=run.covariance(self.structure, self.rank, self.shrinkage),
            memory=run.placed(memory),
            **options,
            **run.arguments,
            **own,
        )


@dataclass(frozen=True)
class MetaSAugOptions(LearnedCovarianceOptions):
    """MetaSAug (Li et al., CVPR 2021).

    The same iteration with ε = 0, β = 0 and class-balanced weights, its Σ the streamed one moved
    by Eq. 9 for one step alone, as in its published code. Its α there is λ t/T over the whole run:
    0.8 λ to λ in the last 40 of 200 epochs. Its covariance_lr is 0.1 there.

    Args:
        class_beta: β of the class-balanced weights.
    """

    class_beta: float = setting(0.9999, least=0, below=1)

    def build(self, run: MethodRun) -> MetaIADA:
        weights = class_balanced_weights(run.class_counts, self.class_beta)
        return self.engine(run, epsilon=0.0, beta=0.0, class_weights=weights, persistent=False)


@dataclass(frozen=True)
class MetaIADAOptions(LearnedCovarianceOptions):
    """Meta-IADA (Zhou et al., IJCAI 2024).

    Ablations are alpha = 0 (without generalization), perturbation "constant" (without robustness),
    beta = 0 (without fairness) and scope = "head".

    Examples:
        >>> config = iada.TrainerConfig(method=iada.MetaIADAOptions(alpha=0.1), epochs=20)

    Args:
        beta: of Eq. 6.
        inverse_weights: losses weighed by 1/π_y, as in Eq. 5, which has no log π: set beta = 0. A
            batch's loss is divided by the sum of its weights.
        perturbation: "learned"; "untrained": Ω keeps its initial values; or "constant": ε is
            `epsilon` for all samples.
        perturbation_lr: Adam's on Ω (η₂ of Eq. 8).
        perturbation_weight_decay: Adam's too; 5e-4 to 1e-4 in sibling codes.
        perturbation_hidden: units of Ω's hidden layer.
        perturbation_init: "default", or "zero" for ε = 0 at the start.
        without_characteristics: names of those that Ω does not see, see `PerturbationNet`.
        epsilon: the constant strength.
        epsilon_scale: see `MetaIADA`.
        epsilon_unit: see `MetaIADA`.
        log_proportion: see `MetaIADA`.
        rate_free_perturbation: see `MetaIADA`.
        persistent: see `MetaIADA`.
    """

    beta: float = 1.0
    inverse_weights: bool = False
    perturbation: str = setting("learned", choices=PERTURBATIONS)
    perturbation_lr: float = setting(1e-3, above=0)
    perturbation_weight_decay: float = setting(0.0, least=0)
    perturbation_hidden: int = setting(100, least=1)
    perturbation_init: str = setting("default", choices=PERTURBATION_INITS)
    without_characteristics: tuple[str, ...] = setting((), choices=CHARACTERISTICS)
    epsilon: float = 0.0
    epsilon_scale: float = setting(1.0, above=0)
    epsilon_unit: str = setting("feature", choices=EPSILON_UNITS)
    log_proportion: bool = False
    rate_free_perturbation: bool = False
    persistent: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon and self.perturbation != "constant":
            expected = f"0 with a perturbation that is {self.perturbation}"
            raise argument_error("epsilon", expected, repr(self.epsilon), "set perturbation too")
        if self.inverse_weights and self.beta:
            remedy = "Eq. 5 has weights in place of log π: set one of them to 0 or False"
            raise argument_error("beta", "0 with inverse_weights", repr(self.beta), remedy)

    @property
    def meta_learns(self) -> bool:
        return super().meta_learns or self.perturbation == "learned"

    def build(self, run: MethodRun) -> MetaIADA:
        options = ("beta", "persistent", "epsilon_scale", "epsilon_unit")
        own: dict[str, Any] = {name: getattr(self, name) for name in options}
        if self.inverse_weights:
            own["class_weights"] = log_class_prior(run.class_counts).neg().exp()
        if self.perturbation == "constant":
            return self.engine(run, epsilon=self.epsilon, **own)
        zero = self.perturbation_init == "zero"
        without = self.without_characteristics
        network = PerturbationNet(hidden=self.perturbation_hidden, zero_init=zero, without=without)
        network = run.placed(network)
        rate, decay = self.perturbation_lr, self.perturbation_weight_decay
        adam = torch.optim.Adam(network.parameters(), lr=rate, weight_decay=decay)
        network.requires_grad_(self.perturbation == "learned")
        own |= {name: getattr(self, name) for name in ("log_proportion", "rate_free_perturbation")}
        return self.engine(run, perturbation=network, perturbation_optimizer=adam, **own)
