"""What a training run is: one frozen dataclass, also readable from TOML."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iada.meta.epsilon_scale import EPSILON_UNITS
from iada.meta.modes import HYPERGRADIENTS, SCOPES
from iada.nn.class_covariance import STRUCTURES
from iada.utils.checks import complain

METHODS = (
    "ce",
    "cb-ce",
    "cb-focal",
    "ldam-drw",
    "logit-adjustment",
    "isda",
    "metasaug",
    "meta-weight-net",
    "meta-iada",
    "cmo",
    "afr",
)
SINGLE_PROCESS = ("cmo", "afr")
STAGED = ("ldam-drw", "cmo", "afr")  # what they do depends on how far the run is
AFTER_CE = ("metasaug", "meta-iada")  # published with a phase of plain CE before them
PERTURBATIONS = ("learned", "untrained", "constant")
PERTURBATION_INITS = ("default", "zero")
SCHEDULES = ("constant", "cosine", "multistep")
UNITS = ("epoch", "step")
AUTOCASTS = ("none", "bfloat16")
# LBFGS asks for the loss many times in a step.
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "LBFGS")
)
LEAST = {
    "epochs": 1,
    "ce_epochs": 0,
    "batch_size": 1,
    "meta_batch_size": 1,
    "interval": 1,
    "checkpoint_every": 1,
    "momentum": 0,
    "weight_decay": 0,
    "alpha": 0,
    "covariance_lr": 0,
    "perturbation_weight_decay": 0,
    "perturbation_hidden": 1,
    "clip_norm": 0,
    "loss_limit": 0,
    "warmup_epochs": 0,
    "class_beta": 0,
    "focal_gamma": 0,
    "reweight_from": 0,
    "finetune_epochs": 1,
}


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of `iada.Trainer`, with the paper's values for CIFAR-LT as defaults.

    Two defaults are not the paper's, so that a first run on other data trains: clip_norm and
    keep_semidefinite. The published runs (`iada.experiments`) have neither.

    method: one of METHODS; docs/training.md has what each minimises, its source and its cost.
    epochs: T2 of Algorithm 1, in epochs.  ce_epochs: T1, the epochs of plain CE before the method;
    by default four fifths of epochs (160 of 200) for Meta-IADA and MetaSAug, 0 for the others,
    which are published without.
    batch_size, meta_batch_size: n and m of Algorithm 1.
    optimizer: of the classifier, by its name in torch.optim: "SGD", "Adam", "AdamW", …
    lr, momentum, weight_decay: its arguments (momentum where it has one); lr is η₁.
    optimizer_options: its other arguments, as in { betas = [0.9, 0.98], eps = 1e-6 }.
    schedule: "constant", "cosine" (to 0), or "multistep": times gamma at each of milestones, epochs
    below the last; by default at 80 and 90 % of them (160 and 180 of 200).
    warmup_epochs: lr rises linearly from a hundredth over so many epochs (parts of one with
    schedule_each "step"), then the schedule begins; milestones count from the start of the run.
    schedule_each: "epoch" or "step": how often lr moves.
    alpha, beta: of Eq. 6.  alpha_ramp: alpha rises linearly from 0 over the method's epochs, as
    in ISDA.
    perturbation_lr: Adam's on Ω (η₂ of Eq. 8), or on Meta-Weight-Net's network.
    perturbation_weight_decay: Adam's too; 5e-4 to 1e-4 in sibling codes.
    perturbation_hidden: units of Ω's hidden layer.  perturbation_init: "default", or "zero" for
    ε = 0 at the start.
    covariance_lr: η₂ of Eq. 9; MetaSAug's published value is 0.1. With 0, and no Ω to be learned,
    there is no meta step: an iteration costs what a plain one does.
    epsilon_scale, epsilon_unit, log_proportion, rate_free_perturbation, rate_free_covariance: see
    `MetaIADA`.
    structure: of the covariance, "full" or "diag".
    perturbation: of Meta-IADA, "learned"; "untrained": Ω keeps its initial values; or "constant":
    ε is `epsilon` for all samples. Ablations
    are alpha = 0 (without generalization), constant 0 (without robustness), beta = 0 (without
    fairness) and scope = "head".
    class_beta: β of the class-balanced weights (cb-ce, cb-focal, ldam-drw, metasaug).
    focal_gamma: γ of cb-focal.
    reweight_from: share of the epochs after which ldam-drw weighs its classes; 160 of 200.
    finetune_epochs: the last epochs, AFR's second stage.  finetune_lr: lr at its start, from which
    it falls to 0 as a cosine; `schedule` is the first stage's.
    persistent, keep_semidefinite, project, hypergradient, scope, interval, low_memory: see
    `MetaIADA`.
    clip_norm: largest norm of the classifier's gradient, 0 for no clipping.
    loss_limit: a loss or meta loss of so many times the phase's first one, or log C if that is
    more, ends the run as diverged; 0 for no limit.
    seed: of initialisation, data order, and what the data set draws.
    checkpoint_every: epochs between checkpoints.
    autocast: "none", or "bfloat16" for the passes through the backbone.
    channels_last: the backbone's weights, and images, in that memory format.
    compile: the training passes by torch.compile. The graph of a compiled backbone cannot be read,
    so that "jvp" goes over to finite differences.
    """

    method: str = "meta-iada"
    epochs: int = 200
    ce_epochs: int = None  # type: ignore[assignment]  # a number once it is built
    batch_size: int = 100
    meta_batch_size: int = 100
    optimizer: str = "SGD"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: str = "multistep"
    milestones: tuple[int, ...] = None  # type: ignore[assignment]  # likewise
    gamma: float = 0.01
    warmup_epochs: float = 0.0
    schedule_each: str = "epoch"
    alpha: float = 0.5
    beta: float = 1.0
    alpha_ramp: bool = False
    perturbation_lr: float = 1e-3
    perturbation_weight_decay: float = 0.0
    perturbation_hidden: int = 100
    perturbation_init: str = "default"
    covariance_lr: float = 1e-3
    rate_free_perturbation: bool = False
    rate_free_covariance: bool = False
    structure: str = "full"
    perturbation: str = "learned"
    epsilon: float = 0.0
    epsilon_scale: float = 1.0
    epsilon_unit: str = "feature"
    log_proportion: bool = False
    class_beta: float = 0.9999
    focal_gamma: float = 1.0
    reweight_from: float = 0.8
    finetune_epochs: int = 50
    finetune_lr: float = 0.01
    persistent: bool = True
    keep_semidefinite: bool = True
    project: bool = False
    hypergradient: str = "jvp"
    scope: str = "full"
    interval: int = 1
    low_memory: bool = False
    clip_norm: float = 1.0
    loss_limit: float = 1e3
    seed: int = 0
    checkpoint_every: int = 1
    autocast: str = "none"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        choices = {
            "method": METHODS,
            "schedule": SCHEDULES,
            "schedule_each": UNITS,
            "structure": STRUCTURES,
            "perturbation": PERTURBATIONS,
            "perturbation_init": PERTURBATION_INITS,
            "epsilon_unit": EPSILON_UNITS,
            "hypergradient": HYPERGRADIENTS,
            "scope": SCOPES,
            "optimizer": OPTIMIZERS,
            "autocast": AUTOCASTS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                wanted = f"one of {', '.join(map(repr, allowed))}"
                raise complain(name, wanted, repr(getattr(self, name)), "pass one of these")
        self._fill_in()
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise complain(name, f"at least {least}", repr(getattr(self, name)), "raise it")
        for name in ("lr", "perturbation_lr", "gamma", "finetune_lr", "epsilon_scale"):
            if getattr(self, name) <= 0:
                raise complain(name, "above 0", repr(getattr(self, name)), "raise it")
        for name, usual in {"momentum": 0.9, "class_beta": 0.9999}.items():
            if getattr(self, name) >= 1:
                raise complain(name, "below 1", repr(getattr(self, name)), f"{usual} is usual")
        if self.reweight_from > 1:
            raise complain("reweight_from", "a share", repr(self.reweight_from), "0.8 is usual")
        if self.epsilon and self.perturbation != "constant":
            remedy = "set perturbation too"
            expected = f"0 with a perturbation that is {self.perturbation}"
            raise complain("epsilon", expected, repr(self.epsilon), remedy)
        twice = {"lr", "momentum", "weight_decay"} & set(self.optimizer_options)
        if twice:
            name = min(twice)
            remedy = f"set {name} itself"
            raise complain("optimizer_options", "other arguments than lr", repr(name), remedy)
        if self.warmup_epochs >= self.epochs:
            expected = f"less than epochs={self.epochs}"
            raise complain("warmup_epochs", expected, repr(self.warmup_epochs), "lower it")
        if any(milestone < 1 for milestone in self.milestones):
            raise complain("milestones", "epochs from 1", repr(self.milestones), "remove others")
        if self.schedule == "multistep" and any(mark >= self.epochs for mark in self.milestones):
            raise complain(
                "milestones",
                f"epochs below epochs={self.epochs}, else lr never falls there",
                repr(self.milestones),
                "lower them, or leave them out for 80 and 90 % of epochs",
            )
        if self.ce_epochs > self.epochs:
            raise complain(
                "ce_epochs",
                f"at most epochs={self.epochs}",
                repr(self.ce_epochs),
                "set it too: it is the part of epochs that trains with plain CE first",
            )
        if self.method == "afr" and self.finetune_epochs > self.epochs - self.ce_epochs:
            raise complain(
                "finetune_epochs",
                f"at most epochs - ce_epochs = {self.epochs - self.ce_epochs}",
                repr(self.finetune_epochs),
                "set it too: it is the last part of epochs",
            )

    def _fill_in(self) -> None:
        """What was left to the method and the number of epochs."""
        if self.ce_epochs is None:
            share = 4 * self.epochs // 5 if self.method in AFTER_CE else 0
            object.__setattr__(self, "ce_epochs", share)
        if self.milestones is None:
            own = self.epochs - (self.finetune_epochs if self.method == "afr" else 0)
            marks = {4 * own // 5, 9 * own // 10} if self.schedule == "multistep" else set()
            object.__setattr__(self, "milestones", tuple(sorted(m for m in marks if m > 0)))


def check_same_run(config: TrainerConfig, former: dict[str, Any]) -> None:
    """ValueError if a run with the settings `former` cannot go on with `config`.

    `checkpoint_every` and `loss_limit` may differ, and `epochs` where nothing depends on it. A
    setting that the former run did not know yet had its default.
    """
    free = {"checkpoint_every", "loss_limit"}
    if config.schedule != "multistep":
        free.add("milestones")
    if config.schedule != "cosine" and not config.alpha_ramp and config.method not in STAGED:
        free.add("epochs")
    former = {**dataclasses.asdict(TrainerConfig()), **former}
    for name, value in dataclasses.asdict(config).items():
        if name not in free and former.get(name) != value:
            raise complain(
                f"checkpoint's {name}",
                f"{value!r} as in this run's settings",
                repr(former.get(name)),
                "resume with the former settings, or choose another folder",
            )


def check_fields(config: Any) -> None:
    """Each field of a frozen dataclass has the type of its default; numbers are finite.

    An int stands for a float, and a list for a tuple of the default's kind. None stands for a
    default that is filled in later, of the field's own type.
    """
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is None:
            if value is None:
                continue
            default = 0 if field.type is int else ()
        remedy = f"see {type(config).__name__}.{field.name}"
        if isinstance(default, tuple):
            if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
                raise complain(field.name, "a list of integers", repr(value), remedy)
            object.__setattr__(config, field.name, tuple(value))
        elif isinstance(default, float) and type(value) in (int, float):
            if not math.isfinite(value):
                raise complain(field.name, "a finite number", repr(value), remedy)
            object.__setattr__(config, field.name, float(value))
        elif type(value) is not type(default):
            wanted = f"a value of type {type(default).__name__}"
            raise complain(field.name, wanted, repr(value), remedy)


def read_toml(path: Path, sections: dict[str, type]) -> dict[str, Any]:
    """A TOML file as one dataclass a section; a section or key that is not known is an error.

    Raises ValueError naming the file, the section and the key, and OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            tables = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected TOML, got {error}; mend that line") from error
    built = {}
    for section in tables:
        if section not in sections:
            known = ", ".join(f"[{name}]" for name in sections)
            raise complain(f"{path} [{section}]", known, "another section", "rename or remove it")
    for section, kind in sections.items():
        values = tables.get(section, {})
        if not isinstance(values, dict):
            raise complain(f"{path} [{section}]", "a table", repr(values), f"write [{section}]")
        known_keys = [field.name for field in dataclasses.fields(kind)]
        for key in values:
            if key not in known_keys:
                raise complain(
                    f"{path} [{section}] {key}",
                    f"one of {', '.join(known_keys)}",
                    "an unknown key",
                    "rename or remove it",
                )
        try:
            built[section] = kind(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} [{section}] {error}") from error
    return built
