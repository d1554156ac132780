"""Which parameters the virtual step of Eq. 7 moves."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from iada.utils.checks import argument_error

SCOPES = ("full", "head")

Scope = str | int  # one of SCOPES, or the number of last blocks that move with the head


def check_scope(scope: Scope) -> None:
    """Raises ValueError for what is neither a name nor a number of blocks."""
    if isinstance(scope, str) and scope in SCOPES:
        return
    if isinstance(scope, bool) or not isinstance(scope, int) or scope < 1:
        expected = "'full', 'head' or a positive int, the number of last blocks"
        raise argument_error("scope", expected, repr(scope), "'full' is the paper's")


def moved_parameters(
    backbone: nn.Module, head: nn.Linear, trained: Sequence[Tensor], scope: Scope
) -> list[Tensor]:
    """Those of `trained` that the virtual step moves, in their order.

    Blocks are the backbone's children that have parameters to be trained, Sequential and ModuleList
    taken apart. Raises ValueError if there are fewer.
    """
    if scope == "full":
        return list(trained)
    moved = {parameter for parameter in (head.weight, head.bias) if parameter is not None}
    if isinstance(scope, int):
        blocks = list(_blocks(backbone))
        while len(blocks) == 1 and any(_blocks(blocks[0])):  # a module around the network
            blocks = list(_blocks(blocks[0]))
        if scope > len(blocks):
            expected = f"at most {len(blocks)}, the blocks of the backbone"
            raise argument_error("scope", expected, repr(scope), "'full' moves all of the backbone")
        moved.update(parameter for block in blocks[-scope:] for parameter in block.parameters())
    return [parameter for parameter in trained if parameter in moved]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks(child)
        elif any(parameter.requires_grad for parameter in child.parameters()):
            yield child
