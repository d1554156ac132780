"""What a training run is: one frozen dataclass, also readable from TOML."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from iada.methods.options import MethodOptions
from iada.methods.registry import METHODS
from iada.utils.checks import argument_error
from iada.utils.settings import check_settings, setting

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


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of `iada.Trainer`, with the paper's values for CIFAR-LT as defaults.

    Examples:
        >>> config = iada.TrainerConfig(method="logit-adjustment", epochs=20)
        >>> config.ce_epochs, config.milestones
        (0, (16, 18))
        >>> config = iada.TrainerConfig(method=iada.MetaIADAOptions(interval=4), epochs=20)
        >>> settings = {"method": "meta-iada", "interval": 4, "epochs": 20}
        >>> config == iada.TrainerConfig.from_settings(settings)
        True

    Two defaults are not the paper's, so that a first run on other data trains: clip_norm and
    keep_semidefinite. The published runs (`iada.experiments`) have neither.

    Args:
        method: a name in `iada.methods.registry.METHODS`, with its options at their defaults; or
            the options, an object that says which method it is; docs/training.md has what each
            minimises, its source and its cost. None where `Trainer` is given your own method.
        epochs: T2 of Algorithm 1, in epochs.
        ce_epochs: T1, the epochs of plain CE before the method; by default four fifths of epochs
            (160 of 200) for Meta-IADA, MetaSAug and RISDA, 0 for those published without.
        batch_size: n of Algorithm 1.
        meta_batch_size: m of Algorithm 1.
        optimizer: of the classifier, by its name in torch.optim: "SGD", "Adam", "AdamW", …
        lr: its learning rate, η₁.
        momentum: its momentum, where it has one.
        weight_decay: its weight decay.
        optimizer_options: its other arguments, as in { betas = [0.9, 0.98], eps = 1e-6 }.
        schedule: "constant", "cosine" (to 0), or "multistep": times gamma at each of milestones.
        milestones: epochs below the last; by default at 80 and 90 % of them (160 and 180 of 200).
        gamma: factor of lr at each of milestones.
        warmup_epochs: lr rises linearly from a hundredth over so many epochs (parts of one with
            schedule_each "step"), then the schedule begins; milestones count from the start of the
            run.
        schedule_each: "epoch" or "step": how often lr moves.
        clip_norm: largest norm of the classifier's gradient, 0 for no clipping.
        loss_limit: a loss or meta loss of so many times the phase's first one, or log C if that is
            more, ends the run as diverged; 0 for no limit.
        seed: of initialisation, data order, and what the data set draws.
        checkpoint_every: epochs between checkpoints.
        autocast: "none", or "bfloat16" for the passes through the backbone.
        channels_last: the backbone's weights, and images, in that memory format.
        compile: the training passes by torch.compile. The graph of a compiled backbone cannot be
            read, so that "jvp" goes over to finite differences.

    Raises:
        ValueError: a setting of another type or beyond its bounds, or that the method lacks.
    """

    # A name is taken too, and is options once it is built: Any lets type checkers pass it.
    method: MethodOptions | Any | None = setting("meta-iada", checked=False)
    epochs: int = setting(200, least=1)
    ce_epochs: int = setting(None, least=0)  # a number once it is built
    batch_size: int = setting(100, least=1)
    meta_batch_size: int = setting(100, least=1)
    optimizer: str = setting("SGD", choices=OPTIMIZERS)
    lr: float = setting(0.1, above=0)
    momentum: float = setting(0.9, least=0, below=1)
    weight_decay: float = setting(5e-4, least=0)
    optimizer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: str = setting("multistep", choices=SCHEDULES)
    milestones: tuple[int, ...] = setting(None)  # likewise
    gamma: float = setting(0.01, above=0)
    warmup_epochs: float = setting(0.0, least=0)
    schedule_each: str = setting("epoch", choices=UNITS)
    clip_norm: float = setting(1.0, least=0)
    loss_limit: float = setting(1e3, least=0)
    seed: int = 0
    checkpoint_every: int = setting(1, least=1)
    autocast: str = setting("none", choices=AUTOCASTS)
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", _options_of(self.method))
        check_settings(self)
        stage, _ = self.last_stage
        if self.ce_epochs is None:
            fraction = 0.0 if self.method is None else self.method.ce_fraction
            object.__setattr__(self, "ce_epochs", int(fraction * self.epochs + 1e-9))
        if self.milestones is None:
            before = self.epochs - stage
            marks = {4 * before // 5, 9 * before // 10} if self.schedule == "multistep" else set()
            object.__setattr__(self, "milestones", tuple(sorted(m for m in marks if m > 0)))
        twice = {"lr", "momentum", "weight_decay"} & set(self.optimizer_options)
        if twice:
            name = min(twice)
            remedy = f"set {name} itself"
            raise argument_error("optimizer_options", "other arguments than lr", repr(name), remedy)
        if self.warmup_epochs >= self.epochs:
            expected = f"less than epochs={self.epochs}"
            raise argument_error("warmup_epochs", expected, repr(self.warmup_epochs), "lower it")
        if any(milestone < 1 for milestone in self.milestones):
            remedy = "remove others"
            raise argument_error("milestones", "epochs from 1", repr(self.milestones), remedy)
        if self.schedule == "multistep" and any(mark >= self.epochs for mark in self.milestones):
            expected = f"epochs below epochs={self.epochs}, else lr never falls there"
            remedy = "lower them, or leave them out for 80 and 90 % of epochs"
            raise argument_error("milestones", expected, repr(self.milestones), remedy)
        if self.ce_epochs > self.epochs:
            expected = f"at most epochs={self.epochs}"
            remedy = "set it too: it is the part of epochs that trains with plain CE first"
            raise argument_error("ce_epochs", expected, repr(self.ce_epochs), remedy)
        if stage > self.epochs - self.ce_epochs:
            expected = f"at most epochs - ce_epochs = {self.epochs - self.ce_epochs}"
            remedy = "set it too: it is the last part of epochs"
            raise argument_error("finetune_epochs", expected, repr(stage), remedy)

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], shared: Mapping[str, Any] | None = None
    ) -> "TrainerConfig":
        """From one flat table, as in TOML: the run's settings and its method's options.

        Args:
            settings: by name; one that neither the run nor its method has is an error.
            shared: of several methods: options that this one does not have are left out.
        """
        values = {**(shared or {}), **settings}
        method = _options_of(values.pop("method", "meta-iada"))
        own = _field_names(cls)
        options = [] if method is None else _field_names(type(method))
        elsewhere = {name for kind in METHODS.values() for name in _field_names(kind)}
        for key in [*values]:
            if key in own or key in options:
                continue
            if key in settings or key not in elsewhere:
                raise _unknown_setting(key, _name_of(method), own + options)
            del values[key]
        chosen = {key: values.pop(key) for key in options if key in values}
        if method is not None and chosen:
            method = dataclasses.replace(method, **chosen)
        return cls(method=method, **values)

    def settings(self) -> dict[str, Any]:
        """The inverse: one flat table of plain values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options = {} if self.method is None else dataclasses.asdict(self.method)
        return {**values, "method": self.method_name, **options}

    @property
    def method_name(self) -> str | None:
        """In METHODS; the options' class where it is not there; None for a method of your own."""
        return _name_of(self.method)

    def alpha_at(self, epoch: int) -> float | None:
        """α of `epoch`; None for a method without."""
        done, own = epoch - self.ce_epochs + 1, max(1, self.epochs - self.ce_epochs)
        return None if self.method is None else self.method.alpha_at(done / own)

    @property
    def schedule_spans_run(self) -> bool:
        """Whether the rate of an epoch depends on how many there are."""
        return self.schedule not in ("constant", "multistep")

    @property
    def last_stage(self) -> tuple[int, float]:
        """See `MethodOptions`."""
        return (0, 0.0) if self.method is None else self.method.last_stage()


def check_config(config: Any) -> None:
    """ValueError for what is no `TrainerConfig`."""
    if not isinstance(config, TrainerConfig):
        got = f"a {type(config).__name__}"
        remedy = "pass TrainerConfig.from_settings(…) of a dict, as a TOML file's [trainer] is one"
        raise argument_error("config", "an iada.TrainerConfig", got, remedy)


def check_same_run(config: TrainerConfig, former: dict[str, Any]) -> None:
    """ValueError if a run with the settings `former` cannot go on with `config`.

    `checkpoint_every` and `loss_limit` may differ, and `epochs` where nothing depends on it. A
    setting that the former run did not know yet had its default.
    """
    free = {"checkpoint_every", "loss_limit"}
    if config.schedule != "multistep":
        free.add("milestones")
    if not config.schedule_spans_run and not (config.method and config.method.counts_epochs):
        free.add("epochs")
    former = with_defaults(former)
    for name, value in config.settings().items():
        if name not in free and former.get(name) != value:
            expected = f"{value!r} as in this run's settings"
            remedy = "resume with the former settings, or choose another folder"
            raise argument_error(f"checkpoint's {name}", expected, repr(former.get(name)), remedy)


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, and the defaults of those that its version did not know."""
    fields = list(dataclasses.fields(TrainerConfig))
    if settings["method"] in METHODS:
        fields += dataclasses.fields(METHODS[settings["method"]])
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {**defaults, **settings}


def _options_of(method: MethodOptions | str | None) -> MethodOptions | None:
    if isinstance(method, str) and method in METHODS:
        method = METHODS[method]()
    if method is None:
        return None
    if isinstance(method, MethodOptions):
        both = set(_field_names(TrainerConfig)) & set(_field_names(type(method)))
        for name in both:  # settings and options are one table in TOML, records and checkpoints
            where = f"{type(method).__name__}.{name}"
            raise argument_error(where, "a name of its own", "that of a setting", "rename it")
        return method
    expected = f"one of {', '.join(map(repr, METHODS))}, or a method's options"
    raise argument_error("method", expected, repr(method), "pass one of these")


def _name_of(method: MethodOptions | None) -> str | None:
    if method is None:
        return None
    names = {kind: name for name, kind in METHODS.items()}
    return names.get(type(method), type(method).__name__)


def _field_names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _unknown_setting(key: str, method: str | None, known: list[str]) -> ValueError:
    having = [name for name, kind in METHODS.items() if key in _field_names(kind)]
    if having:
        got, remedy = f"one of {', '.join(having)}", "remove it, or choose such a method"
        return argument_error(key, f"a setting of the method {method!r}", got, remedy)
    expected = f"one of {', '.join(known)}"
    return argument_error(key, expected, "an unknown key", "rename or remove it")
