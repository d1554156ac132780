"""Random numbers that are a function of (seed, step, sample): counted, not drawn in turn.

A batch's augmentation is then the same whether a run was stopped and resumed before it or not,
and whether one process makes the batch or several make a part of it each. The mixing function is
that of SplitMix64 (Steele, Lea and Flood, 2014), on 64-bit integers that wrap.
"""

from torch import Tensor

from iada.utils.seeds import seed_of

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def draws(seed: int, step: int, rows: Tensor, bounds: tuple[int, ...]) -> list[Tensor]:
    """For each bound (below 2³¹) whole numbers in [0, bound), (N): one for each of `rows` (N)."""
    samples = _mixed(rows.long() * _GOLDEN + seed_of(seed, step))
    steps = [((place + 1) * _GOLDEN + 2**63) % 2**64 - 2**63 for place in range(len(bounds))]
    drawn = [_mixed(samples + step) >> 33 & 0x7FFFFFFF for step in steps]  # the steps wrap as well
    return [bits * bound >> 31 for bits, bound in zip(drawn, bounds, strict=True)]


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift repeats the sign."""
    return bits >> places & (1 << 64 - places) - 1
