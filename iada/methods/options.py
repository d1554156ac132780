"""What every method's options have: how they are built into a method, and how a run treats it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iada.meta.method import Method
from iada.meta.options import HYPERGRADIENTS, MetaStepOptions
from iada.meta.scope import Scope, check_scope
from iada.nn.class_covariance import STRUCTURES, ClassCovariance
from iada.utils.distributed import Group, broadcast
from iada.utils.settings import check_settings, setting

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class MethodRun:
    """What a method is built for.

    backbone, head, optimizer: what it trains, and by what. class_counts: training samples of each
    class, (C). train_set: of which some methods need labels, groups or inputs. epochs,
    ce_epochs, seed, clip_norm: of the run. group: of the processes that share each batch.
    num_workers: of a loader of the training set.
    """

    backbone: nn.Module
    head: nn.Linear
    optimizer: torch.optim.Optimizer
    class_counts: Tensor
    train_set: Dataset | None = None
    epochs: int = 1
    ce_epochs: int = 0
    seed: int = 0
    clip_norm: float = 0.0
    group: Group = None
    num_workers: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """What every method takes, by name."""
        names = ("backbone", "head", "optimizer", "clip_norm")
        return {name: getattr(self, name) for name in names} | {"process_group": self.group}

    @property
    def dtype(self) -> torch.dtype:
        """Of what a method keeps: the head's, float32 at least."""
        return torch.promote_types(torch.float32, self.head.weight.dtype)

    def placed(self, module: Module) -> Module:
        """On the head's device, in its precision or float32, and the same on every rank."""
        module = module.to(self.head.weight.device, self.dtype)
        broadcast([*module.parameters(), *module.buffers()], self.group)
        return module

    def covariance(self, structure: str, rank: int, shrinkage: float) -> ClassCovariance:
        """A new Σ; the rank is that of the low-rank structure."""
        sizes = self.head.out_features, self.head.in_features
        own = rank if structure == "low-rank" else None
        return self.placed(ClassCovariance(*sizes, structure, own, shrinkage=shrinkage))


@dataclass(frozen=True)
class MethodOptions:
    """A method's own settings; a subclass adds them as fields and gives `build`.

    ce_fraction: of the epochs, plain CE before the method, where `ce_epochs` is not given.
    single_process: it cannot share batches between processes.
    own_cross_entropy: its epochs of plain CE are not those of other methods: of another head, or
        counted into what comes later.
    """

    ce_fraction: ClassVar[float] = 0.0
    single_process: ClassVar[bool] = False
    own_cross_entropy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)

    def build(self, run: MethodRun) -> Method:
        """The method for this run."""
        raise NotImplementedError

    @property
    def counts_epochs(self) -> bool:
        """Whether what the method does depends on how far the run is."""
        return False

    @property
    def meta_learns(self) -> bool:
        """Whether steps of the method learn from the meta set, which is what they cost."""
        return False

    def alpha_at(self, progress: float) -> float | None:
        """α at this share of the method's own epochs; None for a method without."""
        return None

    def last_stage(self) -> tuple[int, float]:
        """The last epochs that have a schedule of their own, from this learning rate to 0."""
        return 0, 0.0

    def shortened(self, share: float) -> "MethodOptions":
        """The options in a run of `share` of the epochs."""
        return self


@dataclass(frozen=True)
class CovarianceOptions(MethodOptions):
    """Of the methods with the α term of Eq. 6.

    Args:
        alpha: of Eq. 6.
        alpha_ramp: alpha rises linearly from 0 over the method's epochs, as in ISDA.
        structure: of the covariance, see `ClassCovariance`.
        rank: of the low-rank structure; others have none.
        shrinkage: of the classes' covariances to one that they share, see `ClassCovariance`.
    """

    alpha: float = setting(0.5, least=0)
    alpha_ramp: bool = False
    structure: str = setting("full", choices=STRUCTURES)
    rank: int = setting(32, least=0)
    shrinkage: float = setting(0.0, least=0)

    @property
    def counts_epochs(self) -> bool:
        """Whether alpha rises."""
        return self.alpha_ramp

    def alpha_at(self, progress: float) -> float:
        """Constant, or on demand rising linearly."""
        return self.alpha * max(0.0, progress) if self.alpha_ramp else self.alpha


@dataclass(frozen=True)
class BilevelOptions(MethodOptions):
    """Of the bilevel methods.

    Args:
        hypergradient: see `MetaIADA`.
        scope: see `MetaIADA`.
        interval: see `MetaIADA`.
        low_memory: see `MetaIADA`.
    """

    hypergradient: str = setting("jvp", choices=HYPERGRADIENTS)
    scope: Scope = setting("full", checked=False)
    interval: int = setting(1, least=1)
    low_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self.scope)

    @property
    def meta_step(self) -> MetaStepOptions:
        """As `MetaIADA` and others take them."""
        names = [field.name for field in dataclasses.fields(BilevelOptions)]
        return MetaStepOptions(**{name: getattr(self, name) for name in names})
