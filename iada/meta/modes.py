"""How a meta step is computed: the choices that `MetaIADA` offers."""

from iada.utils.checks import complain

ORACLE = "double-backward"
HYPERGRADIENTS = ("jvp", "finite-difference", ORACLE)
SCOPES = ("full", "head")


def check_modes(hypergradient: str, scope: str, interval: int) -> None:
    """Raises ValueError for a value that is none of these."""
    choices = {"hypergradient": (hypergradient, HYPERGRADIENTS), "scope": (scope, SCOPES)}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            wanted = f"one of {', '.join(map(repr, allowed))}"
            raise complain(name, wanted, repr(value), "pass one of these")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise complain("interval", "a positive int", repr(interval), "1 is every iteration")


def check_not_oracle(hypergradient: str) -> None:
    """Raises ValueError for double backward, which does without what the other two can have."""
    if hypergradient == ORACLE:
        raise complain(
            "hypergradient",
            "'jvp' or 'finite-difference' with low_memory, process_group or scaler",
            repr(hypergradient),
            "leave these out: double backward is the oracle of the other two",
        )
