"""Recipes: what the papers ran, one TOML file an experiment, in `iada/experiments/recipes`.

`base` names a recipe whose sections it starts from; each key in a section replaces the base's.
"""

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from iada.experiments.datasets import NORMALISATIONS, READERS
from iada.experiments.datasets.augment import PADDINGS
from iada.experiments.datasets.views import AUGMENTATIONS
from iada.experiments.metrics import METRICS, OURS
from iada.experiments.scenarios import SCENARIOS
from iada.methods.registry import METHODS
from iada.training.config import TrainerConfig
from iada.utils.checks import argument_error, check_choice
from iada.utils.settings import check_settings

AUGMENTS = ("none", *filter(None, AUGMENTATIONS))
LATER = ("weights", "frozen", "normalise", "crop_padding")  # fields of [model]
Figures = dict[str, float]
Sections = dict[str, dict[str, Any]]  # of a TOML file


@dataclass(frozen=True)
class ModelSettings:
    """[model]: what is trained, and how images reach it.

    backbone: as `iada.models.build_backbone` takes it.  pretrained: with its library's weights.
    weights: which of these, as "IMAGENET1K_V1"; or, not pretrained, the path of a file as
    `iada.models.load_weights` takes it.  frozen: the head alone is trained; the backbone stays as
    it is, its BatchNorm in evaluation mode.
    augment: "none"; "crop-flip"; or, for small images, "autoaugment-cutout", AutoAugment and CutOut
    too, but not in AFR's second stage, and "autoaugment-contrastive", that for half of the images
    and a contrastive one for the others.  image_size: height and width of images read from files.
    normalise: whose means and deviations, one of NORMALISATIONS; "" for the usual ones of the data.
    crop_padding: of crops of small images, as `iada.experiments.datasets.augment.crop_flip` has it.
    """

    backbone: str = "resnet32"
    pretrained: bool = False
    augment: str = "crop-flip"
    image_size: int = 32
    weights: str = ""
    frozen: bool = False
    normalise: str = ""
    crop_padding: str = "black"

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("augment", self.augment, AUGMENTS)
        check_choice("normalise", self.normalise, ("", *NORMALISATIONS))
        check_choice("crop_padding", self.crop_padding, PADDINGS)

    def as_record(self) -> dict[str, Any]:
        """For records and digests; a later field enters only where it is not what it was before."""
        before = {f.name: f.default for f in dataclasses.fields(self) if f.name in LATER}
        values = dataclasses.asdict(self)
        return {n: v for n, v in values.items() if n not in before or v != before[n]}


@dataclass(frozen=True)
class MethodEntry:
    """One row of a table: a method with its settings, and the published figures in percent.

    with_meta: the meta set's images are training images too, and there is no meta set.
    meta_per_class: of the meta set's images of each class, so many are used; 0 for all.
    augment: in the place of the model's; "" for that.
    """

    key: str
    title: str
    trainer: TrainerConfig
    published: Figures
    with_meta: bool = False
    meta_per_class: int = 0
    augment: str = ""

    def __post_init__(self) -> None:
        check_choice("augment", self.augment, ("", *AUGMENTS))


@dataclass(frozen=True)
class DerivedEntry:
    """A row of a table that other figures of a method's runs make: nothing is trained for it.

    of: the method's key.  metrics: for each of the table's, the one of METRICS to show.
    """

    title: str
    of: str
    metrics: dict[str, str]
    published: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    name: "table2/cifar10-100".  source: table and paper.  needs: the data set, in words.
    metrics: the columns of the table, names of `iada.experiments.metrics.METRICS`.
    selection: the epoch that the paper reports, "last" or "best".
    reference: the method whose lead over each other is told, seed by seed; "" for none.
    data: the reader's name in `iada.experiments.datasets.READERS`, as "reader", and its options.
    scenario: the name in `iada.experiments.scenarios.SCENARIOS`, as "name", and its parameters.
    published: rows of the table that have no method here.
    derived: rows that need no training of their own, by key.
    """

    name: str
    title: str
    source: str
    metrics: tuple[str, ...]
    selection: str
    reference: str
    needs: str
    data: dict[str, Any]
    scenario: dict[str, Any]
    model: ModelSettings
    methods: tuple[MethodEntry, ...]
    published: dict[str, Figures] = field(default_factory=dict)
    derived: dict[str, DerivedEntry] = field(default_factory=dict)

    def as_run(self, entry: MethodEntry) -> "Recipe":
        """With what the method says of the model in the model."""
        if not entry.augment:
            return self
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, augment=entry.augment)
        )

    @property
    def row(self) -> str:
        """The name after the table's."""
        return self.name.split("/")[1]


def names() -> list[str]:
    """All recipes, in the papers' order."""
    root = _root()
    recipes = [
        f"{folder.name}/{file.name.removesuffix('.toml')}"
        for folder in root.iterdir()
        if folder.is_dir() and folder.name != "base"
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    ]
    return sorted(recipes, key=lambda name: (_order(name), name))


def table_name(table: str) -> str:
    """The folder of "2", "6" or "afr-1"; figures are "figure6"."""
    tables = sorted({name.split("/")[0] for name in names()})
    name = table.lower()
    for candidate in (name, f"table{name}", name.replace("afr-", "afr-table")):
        if candidate in tables:
            return candidate
    raise argument_error("--table", f"one of {', '.join(tables)}", repr(table), "see --list")


def load(name: str, changes: dict[str, dict[str, Any]] | None = None) -> Recipe:
    """The recipe called `name`, with `changes` {section: {key: value}} over its own.

    Sections are data, scenario, model, trainer, and methods.KEY, which goes before trainer. Raises
    ValueError naming the recipe, the section and the key; for a change of trainer that a method's
    own setting would undo, too.
    """
    check_choice("recipe", name, names(), "see --list")
    return from_sections(name, _sections(name), changes)


def sections_of(source: str | Path) -> Sections:
    """The sections of the recipe called `source`, or of a TOML file."""
    if isinstance(source, str):
        return _sections(source)
    try:
        sections = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise argument_error(source, "TOML", error, "mend that line") from error
    plain = [key for key, values in sections.items() if not isinstance(values, dict)]
    if plain:
        raise argument_error(f"{source} {plain[0]}", "a section", "a value", f"write [{plain[0]}]")
    return sections


def merged(base: Sections, sections: Sections) -> Sections:
    """The base's sections; each key of the others' replaces its own."""
    return base | {name: {**base.get(name, {}), **values} for name, values in sections.items()}


def with_own(base: Sections, sections: Sections) -> Sections:
    """`merged`, but a method's own settings go over the base's of that method, key by key."""
    methods = dict(base.get("methods", {}))
    for key, settings in sections.get("methods", {}).items():
        if not isinstance(settings, dict):
            remedy = f"write [methods.{key}]"
            raise argument_error(f"methods.{key}", "a section", repr(settings), remedy)
        methods[key] = {**methods.get(key, {}), **settings}
    return {**merged(base, sections), "methods": methods}


def from_sections(
    name: str, sections: Sections, changes: dict[str, dict[str, Any]] | None = None
) -> Recipe:
    """The recipe that these sections make, with `changes` as in `load`."""
    for section, values in (changes or {}).items():
        methods = {f"methods.{key}": key for key in sections["methods"]}
        if section in methods:
            _check_own(section, values)
            sections["methods"][methods[section]] |= values
        elif section in ("data", "scenario", "model", "trainer"):
            if section == "trainer":
                _check_shared(values, sections["methods"])
            sections[section] = {**sections.get(section, {}), **values}
        else:
            expected = f"data, scenario, model, trainer, {', '.join(methods)}"
            raise argument_error(f"section {section}", expected, repr(section), "rename it")
    recipe = _build(name, sections)
    for key in (changes or {}).get("trainer", {}):
        if not any(key in entry.trainer.settings() for entry in recipe.methods):
            expected = f"a setting of one of {', '.join(sections['methods'])}"
            raise argument_error(f"trainer.{key}", expected, "one that none has", "leave it out")
    return recipe


def _check_own(section: str, values: dict[str, Any]) -> None:
    """A change of one method is one of its settings."""
    for key in values:
        if key in ("title", "published", "method", "with_meta"):
            expected = "a setting of the trainer"
            raise argument_error(f"{section}.{key}", expected, repr(key), "choose another")


def _check_shared(values: dict[str, Any], methods: dict[str, dict[str, Any]]) -> None:
    """A change for all methods is not of a setting that one of them has for itself."""
    for key in values:
        overriding = [name for name, settings in methods.items() if key in settings]
        if overriding:
            expected = "a setting that all methods of this recipe share"
            got = f"one that {', '.join(overriding)} set for themselves"
            remedy = f"pass methods.{overriding[0]}.{key} and the like"
            raise argument_error(f"trainer.{key}", expected, got, remedy)


def _build(name: str, sections: Sections) -> Recipe:
    about = sections["experiment"]
    unknown = set(sections) - {"experiment", "data", "scenario", "model", "trainer", "methods"}
    unknown -= {"published", "derived", "sweeps"}
    if unknown:
        raise argument_error(f"{name} [{min(unknown)}]", "a known section", "another", "rename it")
    for metric in about["metrics"]:
        check_choice(f"{name} metrics", metric, METRICS, "mend it")
    check_choice(f"{name} [scenario] name", sections["scenario"]["name"], SCENARIOS, "mend it")
    check_choice(f"{name} [data] reader", sections["data"]["reader"], READERS, "mend it")
    try:
        model = ModelSettings(**sections.get("model", {}))
        methods = tuple(
            _method_entry(key, values, sections.get("trainer", {}))
            for key, values in _swept(sections["methods"], sections.get("sweeps", {})).items()
        )
        derived = {k: DerivedEntry(**values) for k, values in sections.get("derived", {}).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    data = dict(sections["data"])
    keys = [entry.key for entry in methods]
    reference = about.get("reference", OURS if OURS in keys else "")
    if reference:
        check_choice(f"{name} reference", reference, keys, "mend it")
    return Recipe(
        name=name,
        title=about["title"],
        source=about["source"],
        metrics=tuple(about["metrics"]),
        selection=about.get("selection", "last"),
        reference=reference,
        needs=data.pop("needs"),
        data=data,
        scenario=dict(sections["scenario"]),
        model=model,
        methods=methods,
        published=sections.get("published", {}),
        derived=derived,
    )


def _swept(
    methods: dict[str, dict[str, Any]], sweeps: dict[str, dict[str, list[Any]]]
) -> dict[str, dict[str, Any]]:
    """The methods, and one more for each value of each setting that [sweeps.METHOD] lists.

    "meta-iada-alpha-0.1" is meta-iada with alpha = 0.1; of a list all items are in the name.
    """
    arms = dict(methods)
    for key, settings in sweeps.items():
        for name, values in settings.items():
            for value in values:
                word = "+".join(map(str, value)) if isinstance(value, list) else value
                title = f"{methods[key]['title']}, {name} {word}"
                arm = {"method": key, **methods[key], "title": title, name: value}
                arms[f"{key}-{name.replace('_', '-')}-{word}"] = arm
    return arms


def _method_entry(key: str, values: dict[str, Any], shared: dict[str, Any]) -> MethodEntry:
    settings = dict(values)
    title, published = settings.pop("title", key), settings.pop("published", {})
    data = {n: settings.pop(n) for n in ("with_meta", "meta_per_class", "augment") if n in settings}
    settings.setdefault("method", key)
    check_choice(f"[methods.{key}] method", settings["method"], METHODS, "add method")
    config = TrainerConfig.from_settings(settings, shared)
    return MethodEntry(key, title, config, published, **data)


def _sections(name: str) -> Sections:
    text = (_root() / f"{name}.toml").read_text(encoding="utf-8")
    sections = tomllib.loads(text)
    base = sections.pop("base", None)
    if base is None:
        return sections
    return with_own(_sections(base), sections)


def _root() -> Traversable:
    return resources.files("iada.experiments") / "recipes"


def _order(name: str) -> tuple[int, int]:
    """The papers' tables in their order, then figures, then what is not of a paper."""
    folder = name.split("/")[0]
    kinds = ("table", "uniform-noise", "figure", "afr-table", "controls", "frozen", "digits")
    kind = next((rank for rank, start in enumerate(kinds) if folder.startswith(start)), len(kinds))
    return kind, int("".join(filter(str.isdigit, folder)) or 0)


def shortened(config: TrainerConfig, epochs: int) -> TrainerConfig:
    """The same schedule in so many epochs: every mark on it moves in proportion.

    At least one epoch is the method's own.
    """
    share = epochs / config.epochs
    marks = [max(1, round(mark * share)) for mark in config.milestones]
    return dataclasses.replace(
        config,
        epochs=epochs,
        ce_epochs=min(epochs - 1, round(config.ce_epochs * share)),
        method=config.method and config.method.shortened(share),
        milestones=tuple(mark for mark in marks if mark < epochs),
        warmup_epochs=config.warmup_epochs * share,
    )


def parse_change(text: str) -> tuple[str, str, Any]:
    """("scenario", "kind", "flip") of "scenario.kind=flip"; the value as TOML where it is.

    The section is all before the last dot, as in "methods.meta-iada.alpha=0.25".
    """
    target, equals, value = text.partition("=")
    section, dot, key = target.strip().rpartition(".")
    if not (equals and dot and key):
        raise argument_error("--set", "section.key=value", repr(text), "as in scenario.ratio=50")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value


def changes_of(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of several such texts."""
    changes: dict[str, dict[str, Any]] = {}
    for section, key, value in map(parse_change, texts):
        changes.setdefault(section, {})[key] = value
    return changes


def recipe_folder() -> Path:
    """Where the recipes lie, for a person to read."""
    return Path(str(_root()))
