"""The perturbation network: training characteristics in, perturbation strengths out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iada.utils.checks import check_float

NUM_CHARACTERISTICS = 15


class PerturbationNet(nn.Module):
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
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_characteristics: int = NUM_CHARACTERISTICS,
        hidden: int = 100,
        zero_init: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_characteristics, device=device, dtype=dtype)
        self.hidden = nn.Linear(num_characteristics, hidden, device=device, dtype=dtype)
        self.strength = nn.Linear(hidden, 1, device=device, dtype=dtype)
        if zero_init:
            nn.init.zeros_(self.strength.weight)
            nn.init.zeros_(self.strength.bias)

    def forward(self, characteristics: Tensor) -> Tensor:
        """ε (N,) of characteristics (N, 15). A single row is normalised by running statistics.

        Raises:
            ValueError: another width or dtype.
        """
        width = self.norm.num_features
        expected = f"a floating-point tensor (N, {width})"
        check_float("characteristics", characteristics, expected, (None, width))
        if self.training and len(characteristics) > 1:
            normal = self.norm(characteristics)
        else:  # One row has no batch statistics: the running ones serve.
            norm = self.norm
            state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            normal = F.batch_norm(characteristics, *state, eps=norm.eps)
        return self.strength(self.hidden(normal).relu()).squeeze(1).tanh()
