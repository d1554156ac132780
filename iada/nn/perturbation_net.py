"""The perturbation network: training characteristics in, perturbation strengths out."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.nn.characteristics import CHARACTERISTICS
from iada.nn.precision import KeepsPrecision
from iada.utils.checks import argument_error, check_choice, check_float

NUM_CHARACTERISTICS = len(CHARACTERISTICS)


class PerturbationNet(KeepsPrecision):
    """ε(f, Ω) of Eq. 7: BatchNorm → Linear(15, 100) → ReLU → Linear(100, 1) → tanh.

    Maps characteristics (N, 15) to strengths ε (N,) in (−1, 1), in units of the features;
    positive is adversarial, negative anti-adversarial.

    Examples:
        >>> iada.PerturbationNet(zero_init=True)(torch.randn(4, 15)).tolist()
        [0.0, 0.0, 0.0, 0.0]

    Args:
        num_characteristics: width of the input.
        hidden: width of the hidden layer.
        zero_init: start from ε = 0 for every sample, instead of the random ±0.2 of torch's usual
            initial values: training by Eq. 6 then begins as Logit Adjustment with its α term.
        without: names of characteristics that are left out, of `CHARACTERISTICS` in
            iada.nn.characteristics; the input keeps its fifteen columns.
        device: of the parameters.
        dtype: of the parameters.
    """

    columns: Tensor | None

    def __init__(
        self,
        num_characteristics: int = NUM_CHARACTERISTICS,
        hidden: int = 100,
        zero_init: bool = False,
        without: Sequence[str] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_characteristics = num_characteristics
        self._kept = kept = _kept(num_characteristics, without)
        columns = None if len(kept) == num_characteristics else torch.tensor(kept, device=device)
        self.register_buffer("columns", columns, persistent=False)
        self.norm = nn.BatchNorm1d(len(kept), device=device, dtype=dtype)
        self.hidden = nn.Linear(len(kept), hidden, device=device, dtype=dtype)
        self.strength = nn.Linear(hidden, 1, device=device, dtype=dtype)
        if zero_init:
            nn.init.zeros_(self.strength.weight)
            nn.init.zeros_(self.strength.bias)

    def forward(self, characteristics: Tensor) -> Tensor:
        """ε (N,) of characteristics (N, 15), in their dtype; Ω computes in its own.

        A single row is normalised by running statistics.

        Raises:
            ValueError: another width or dtype.
        """
        width = self.num_characteristics
        expected = f"a floating-point tensor (N, {width})"
        check_float("characteristics", characteristics, expected, (None, width))
        if self.columns is not None:
            characteristics = characteristics.index_select(1, self.columns)
        own = characteristics.to(self.hidden.weight.dtype)
        if self.training and len(own) > 1:
            normal = self.norm(own)
        else:  # One row has no batch statistics: the running ones serve.
            norm = self.norm
            state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            normal = F.batch_norm(own, *state, eps=norm.eps)
        epsilon = self.strength(self.hidden(normal).relu()).squeeze(1).tanh()
        return epsilon.to(characteristics.dtype)

    def get_extra_state(self) -> Tensor:
        """The columns of the characteristics that it sees."""
        return torch.tensor(self._kept, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError if it is of a network that sees others."""
        if state.tolist() != self._kept:
            expected, got = f"a state of columns {self._kept}", f"one of {state.tolist()}"
            remedy = "build the network with the `without` that the state is of"
            raise argument_error("without", expected, got, remedy)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # States from before the columns were in them are taken as they are.
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *others)


def _kept(count: int, without: Sequence[str]) -> list[int]:
    """The columns of those that are not left out."""
    if not without:
        return list(range(count))
    if count != NUM_CHARACTERISTICS:
        expected = f"{NUM_CHARACTERISTICS} with names of these to be left out"
        raise argument_error("num_characteristics", expected, count, "leave out columns yourself")
    for name in without:
        check_choice("without", name, CHARACTERISTICS)
    kept = [column for column, name in enumerate(CHARACTERISTICS) if name not in without]
    if not kept:
        remedy = "a number for ε is a perturbation without Ω"
        raise argument_error("without", "one characteristic at least that is kept", "all", remedy)
    return kept
