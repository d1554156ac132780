"""How a meta step is computed: the choices that the bilevel methods offer."""

from dataclasses import dataclass

from iada.meta.virtual_step import VirtualStep
from iada.utils.checks import check_choice, check_count, refusal

DOUBLE_BACKWARD = "double-backward"
HYPERGRADIENTS = ("jvp", "finite-difference", DOUBLE_BACKWARD)
SCOPES = ("full", "head")


@dataclass(frozen=True)
class MetaStepOptions:
    """`MetaIADA` has what each means and costs."""

    hypergradient: str = "jvp"
    scope: str = "full"
    interval: int = 1
    low_memory: bool = False
    virtual: VirtualStep = VirtualStep()

    def __post_init__(self) -> None:
        check_choice("hypergradient", self.hypergradient, HYPERGRADIENTS)
        check_choice("scope", self.scope, SCOPES)
        check_count("interval", self.interval, remedy="1 is every iteration")

    def refuse_double_backward(self, allowed: str, remedy: str) -> None:
        """Raises ValueError for double backward, which does without what the other two can have."""
        if self.hypergradient == DOUBLE_BACKWARD:
            expected = f"'jvp' or 'finite-difference' {allowed}"
            raise refusal("hypergradient", expected, repr(DOUBLE_BACKWARD), remedy)
