"""Launch configurations: how each kernel is cut into programs, one record for each kind of GPU.

They are fixed, so that a result and its speed do not depend on what ran before; `use` replaces
one for tuning.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`. Triton's own serves kernels too and takes a microsecond here."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below `size`, which is positive."""
    return 1 << (int(size) - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """A program's tile: rows × columns of its result, steps of `depth` along the summed axis."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 2

    def of(self, dtype: torch.dtype) -> "Tile":
        """For sums in `dtype`: of float64 32 rows at most; Triton 3.6 aborts on Blackwell at 64."""
        return replace(self, rows=min(self.rows, 32)) if dtype == torch.float64 else self

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles a result of this size has along each axis."""
        return cdiv(rows, self.rows), cdiv(columns, self.columns)


@dataclass(frozen=True)
class SingleLaunchLimits:
    """The shapes that the single-launch loss serves, and how it is cut."""

    rows: int  # the largest N; 0 turns the single launch off
    classes: int  # the largest C
    width: int  # the largest A
    tile_bytes: int  # the largest W, padded to powers of two
    odd_tile_bytes: int  # and where A is no multiple of 16
    block_elements: int  # rows × C of one block of 16 to 64 rows
    step: int  # classes or features that one product reads at a time
    class_step: int  # rows of the quadratic forms' product at a time
    group: int  # labels read at a time
    columns: int  # elements of a gradient that a program of the backward pass sums
    warps: int = 8
    stages: int = 1
    float64: bool = True  # whether sums in it are served


@dataclass(frozen=True)
class LargeTiles:
    """For results of `ROWS` rows or more, which Hopper multiplies by groups of warps (wgmma)."""

    ROWS: ClassVar[int] = 64
    class_pass: Tile
    diagonal_logits: Tile
    diagonal_weight: Tile


@dataclass(frozen=True)
class Configuration:
    """One tile for each kernel, and how float32 is multiplied.

    In brackets the axes of a tile: rows, columns, depth. `diagonal_...` are used where the kernel
    also computes the quadratic term of a diagonal Σ.
    """

    class_pass: Tile  # (A, classes, rows of the class)
    rank_c_update: Tile  # (A, classes, -), the same kernel for UPDATE = ACCUMULATE, OVERWRITE
    class_pass_weight: Tile  # (classes, A, A)
    logits: Tile  # (N, C, A); the rows of the classes take its warps and stages
    diagonal_logits: Tile
    tangent: Tile  # (N, C, A)
    diagonal_tangent: Tile
    sign: Tile  # (N, A, C); the moments take its warps and stages
    softmax: Tile  # (N, C, -), where it is a launch of its own
    softmax_classes: int  # up to here, but for a diagonal Σ, it is part of the logits' launch
    grad_features: Tile  # (N, A, C)
    grad_weight: Tile  # (C, A, N); class_sums and grad_features take its warps and stages
    diagonal_weight: Tile
    class_sums: Tile  # (C, C, N)
    moments: Tile  # (rows of the class, A, -)
    statistics: Tile  # (N, C or A, A)
    single_launch: SingleLaunchLimits
    group: int  # labels read at a time
    split_rows: int  # rows of the batch that one program sums at most (split-K)
    programs: int  # to aim at where a sum over classes is split
    true_float32: str  # input_precision of tl.dot for torch's matmul precision "highest"
    fast_float32: str  # and for the others
    large: LargeTiles | None = None

    def tile_of(self, kernel: str, rows: int, width: int, dtype: torch.dtype) -> Tile:
        """Of `kernel`, a field, for a result of so many rows; A = `width`, sums in `dtype`."""
        if (
            self.large is not None
            and rows >= self.large.ROWS
            and width % 16 == 0  # else addresses take registers that these tiles do not have
            and dtype == torch.float32
        ):
            return getattr(self.large, kernel)
        return getattr(self, kernel).of(dtype)


# Where A is no multiple of 16, addresses take registers: with larger tiles, longer steps or fewer
# warps the head's products and the rank-C update keep some in memory (bench.resources --matrix).
# Hopper's; the others' records start from it.
NVIDIA = Configuration(
    class_pass=Tile(64, 32, 16, warps=8),
    rank_c_update=Tile(64, 16, 16, warps=8),
    class_pass_weight=Tile(64, 64, 32),
    logits=Tile(32, 64, 32, warps=8),
    diagonal_logits=Tile(16, 32, 16),
    tangent=Tile(32, 64, 16, warps=8),
    diagonal_tangent=Tile(16, 32, 16),
    sign=Tile(32, 64, 16, warps=8),
    softmax=Tile(2, 512, 0),
    softmax_classes=256,  # more would take one program longer than another launch
    grad_features=Tile(32, 64, 32, warps=8),
    grad_weight=Tile(32, 64, 16),
    diagonal_weight=Tile(16, 32, 16),
    class_sums=Tile(32, 32, 32),
    moments=Tile(32, 64, 0),
    statistics=Tile(16, 64, 32, warps=8),
    single_launch=SingleLaunchLimits(
        rows=1024,
        classes=128,
        width=64,
        tile_bytes=2**15,
        odd_tile_bytes=2**14,
        block_elements=1024,
        step=32,
        class_step=64,
        group=256,
        columns=64,
    ),
    group=1024,
    split_rows=4096,
    programs=512,
    true_float32="tf32x3",
    fast_float32="tf32",
    large=LargeTiles(
        class_pass=Tile(64, 64, 16, warps=8),
        diagonal_logits=Tile(64, 32, 16, warps=8),
        diagonal_weight=Tile(64, 32, 16, warps=8),
    ),
)

# Ampere multiplies in registers, where the two products of a rank-C update do not fit, nor long
# steps of the class pass onto the weight.
AMPERE = replace(
    NVIDIA,
    rank_c_update=Tile(32, 16, 16, warps=8),
    class_pass_weight=Tile(64, 64, 16, warps=8),
    large=None,
)

# In steps of 16 rows the update alone would spill 8 bytes here. Triton 3.6 aborts on a product of
# float64 with 64 rows, see `Tile.of`, as a single launch has them.
BLACKWELL = replace(
    NVIDIA,
    class_pass=Tile(64, 32, 32, warps=8),
    single_launch=replace(NVIDIA.single_launch, float64=False),
    large=None,
)

# RTX 50: Blackwell's compiler, Ampere's instructions and registers.
BLACKWELL_RTX = replace(AMPERE, single_launch=BLACKWELL.single_launch)

# 64 KiB of shared memory, and no TF32: a product of float32 takes more registers.
AMD = replace(
    NVIDIA,
    class_pass=Tile(32, 32, 16),
    rank_c_update=Tile(32, 32, 16),
    logits=Tile(32, 64, 32),
    diagonal_logits=Tile(32, 32, 16),
    tangent=Tile(32, 64, 32, warps=8),
    sign=Tile(32, 64, 32),
    grad_features=Tile(32, 64, 32),
    grad_weight=Tile(32, 64, 32),
    diagonal_weight=Tile(32, 32, 16),
    statistics=Tile(16, 64, 32),
    single_launch=replace(NVIDIA.single_launch, odd_tile_bytes=2**13, block_elements=512),
    true_float32="ieee",
    fast_float32="ieee",
    large=None,
)

# Small, so that small tests have several tiles along every axis.
INTERPRETER = Configuration(
    class_pass=Tile(32, 16, 16),
    rank_c_update=Tile(32, 16, 16),
    class_pass_weight=Tile(16, 32, 32),
    logits=Tile(32, 16, 32),
    diagonal_logits=Tile(32, 16, 32),
    tangent=Tile(32, 16, 32),
    diagonal_tangent=Tile(32, 16, 32),
    sign=Tile(32, 32, 16),
    softmax=Tile(16, 16, 0),
    softmax_classes=2048,
    grad_features=Tile(32, 32, 16),
    grad_weight=Tile(16, 32, 32),
    diagonal_weight=Tile(16, 32, 32),
    class_sums=Tile(16, 16, 32),
    moments=Tile(16, 32, 0),
    statistics=Tile(16, 32, 32),
    single_launch=SingleLaunchLimits(
        rows=1024,
        classes=128,
        width=128,
        tile_bytes=2**17,
        odd_tile_bytes=2**16,
        block_elements=256,
        step=16,
        class_step=16,
        group=32,
        columns=16,
    ),
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
    """Launch with `configuration` inside, whatever the architecture: for tuning.

    Of this thread; backward passes on a GPU run in autograd's, unless inside
    `torch.autograd.set_multithreading_enabled(False)`.
    """
    token = _chosen.set(configuration)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> Configuration | None:
    """The configuration of the `use` that this is inside of."""
    return _chosen.get()


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
        return BLACKWELL_RTX if architecture.startswith("sm_12") else BLACKWELL
    return AMPERE if architecture.startswith("sm_8") else NVIDIA
