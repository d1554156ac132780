"""Launch configurations: how each kernel is cut into programs, one record for each architecture.

They are fixed, so that a result and its speed do not depend on what ran before. Whoever wants to
tune replaces one with `use`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """A program's tile: rows × columns of its result, steps of `depth` along what is summed."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Small:
    """The single-launch loss: the shapes that it serves, and how.

    rows, classes, width: the largest N (0 to do without it), C and A · tile_bytes: the largest W,
    padded to powers of two · row_numbers: rows × C of a block of 16 to 64 rows · step: what a
    product over C or A reads at once · classes_at_once: rows of P at once · group: labels read at
    once · columns: numbers of a gradient that a program of the backward pass adds up.
    """

    rows: int
    classes: int
    width: int
    tile_bytes: int
    row_numbers: int
    step: int
    classes_at_once: int
    group: int
    columns: int
    warps: int = 8


@dataclass(frozen=True)
class Configuration:
    """One tile for each kernel, and how float32 is multiplied.

    class_pass, and pair_terms for its META and FRESH: (A, classes j, rows of the class) ·
    class_pass_weight: (classes j, A, A) · logits and tangent: (N, C, A) · sign: (N, A, C) ·
    softmax: (N, C, -) · grad_features: (N, A, C) ·
    grad_weight: (C, A, N) · diagonal_...: the same with the quadratic term of a diagonal Σ ·
    class_sums: (C, C, N) · moments: (rows of the class, A, -) · statistics: (N, C or A, A) ·
    group: labels read at once · split_rows: rows of the batch that one program sums at most,
    beyond which sums over the batch are cut · programs: how many to aim at where a sum over
    classes is cut.
    true_float32 and fast_float32: `input_precision` of tl.dot when torch's float32 matmul
    precision is "highest", and when it is not.
    """

    class_pass: Tile
    pair_terms: Tile
    class_pass_weight: Tile
    logits: Tile
    diagonal_logits: Tile
    tangent: Tile
    diagonal_tangent: Tile
    sign: Tile
    softmax: Tile
    grad_features: Tile
    grad_weight: Tile
    diagonal_weight: Tile
    class_sums: Tile
    moments: Tile
    statistics: Tile
    small: Small
    group: int
    split_rows: int
    programs: int
    true_float32: str
    fast_float32: str


NVIDIA = Configuration(
    class_pass=Tile(64, 32, 16, warps=8),
    pair_terms=Tile(64, 32, 16, warps=8),
    class_pass_weight=Tile(64, 64, 32),
    logits=Tile(32, 64, 32),
    diagonal_logits=Tile(32, 32, 16),
    tangent=Tile(32, 64, 32, warps=8),
    diagonal_tangent=Tile(16, 32, 16),
    sign=Tile(32, 64, 32),
    softmax=Tile(4, 256, 0),
    grad_features=Tile(32, 64, 32),
    grad_weight=Tile(32, 64, 32),
    diagonal_weight=Tile(32, 32, 16),
    class_sums=Tile(32, 32, 32),
    moments=Tile(32, 64, 0),
    statistics=Tile(16, 64, 32),
    small=Small(1024, 128, 64, 2**15, 1024, 32, 64, 256, 64),
    group=1024,
    split_rows=4096,
    programs=512,
    true_float32="tf32x3",
    fast_float32="tf32",
)

# Ampere multiplies in registers, where the two products of a META tile do not fit.
AMPERE = replace(
    NVIDIA,
    pair_terms=Tile(32, 32, 16, warps=8),
    diagonal_tangent=Tile(32, 32, 16, warps=8),
)

# In steps of 16 rows the update alone would spill 8 bytes here.
BLACKWELL = replace(NVIDIA, class_pass=Tile(64, 32, 32, warps=8))

# 64 KiB of shared memory, and no TF32: a product of float32 takes more registers.
AMD = replace(
    NVIDIA,
    class_pass=Tile(32, 32, 16),
    pair_terms=Tile(32, 32, 16),
    small=Small(1024, 128, 64, 2**15, 512, 32, 64, 256, 64),
    true_float32="ieee",
    fast_float32="ieee",
)

# Small, so that small tests have several tiles along every axis.
INTERPRETER = Configuration(
    class_pass=Tile(32, 16, 16),
    pair_terms=Tile(32, 16, 16),
    class_pass_weight=Tile(16, 32, 32),
    logits=Tile(32, 16, 32),
    diagonal_logits=Tile(32, 16, 32),
    tangent=Tile(32, 16, 32),
    diagonal_tangent=Tile(32, 16, 32),
    sign=Tile(32, 32, 16),
    softmax=Tile(16, 16, 0),
    grad_features=Tile(32, 32, 16),
    grad_weight=Tile(16, 32, 32),
    diagonal_weight=Tile(16, 32, 32),
    class_sums=Tile(16, 16, 32),
    moments=Tile(16, 32, 0),
    statistics=Tile(16, 32, 32),
    small=Small(1024, 128, 128, 2**17, 256, 16, 16, 32, 16),
    group=64,
    split_rows=64,
    programs=4,
    true_float32="ieee",
    fast_float32="ieee",
)

_chosen: contextvars.ContextVar[Configuration | None] = contextvars.ContextVar(
    "configuration", default=None
)


@contextlib.contextmanager
def use(configuration: Configuration) -> Iterator[None]:
    """Launch with `configuration` inside, whatever the architecture: for tuning."""
    token = _chosen.set(configuration)
    try:
        yield
    finally:
        _chosen.reset(token)


def configuration_for(architecture: str) -> Configuration:
    """The record for "sm_90", "gfx942", "interpreter" and their like."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    if architecture == "interpreter":
        return INTERPRETER
    if architecture.startswith("gfx"):
        return AMD
    if architecture.startswith("sm_1"):
        return BLACKWELL
    return AMPERE if architecture.startswith("sm_8") else NVIDIA
