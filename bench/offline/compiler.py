"""Compiling Triton kernels for GPUs that are not here, and what the binaries say of themselves.

A kernel is compiled through its own `warmup`, so that its arguments are specialised (divisibility,
ones, pointer ranges) and its options completed just as they are at a launch on that GPU.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from iada_kernels.triton.launch import ALL_REGISTERS, Launch

# Shared memory that one program can ask for, in bytes: NVIDIA's opt-in maximum, AMD's LDS.
GRID_LIMIT = (2**31 - 1, 65535, 65535)
TENSOR_MEMORY_LIMIT = 512  # columns, from sm_100 on
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    # On request: GeForce and RTX cards, the MI200s.
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
}

# From compute capability 8.0 on CUDA keeps 1 KiB of each program's shared memory for itself. It is
# part of what cuobjdump shows and of the multiprocessor's memory, not of the limits above.
CUDA_RESERVED = 1024


@dataclass(frozen=True)
class Usage:
    """What a binary takes: registers of a thread, bytes of its stack, shared bytes of a program.

    tensor_memory: columns of the tensor memory that sm_100 has.
    spilled: registers kept in that stack. On AMD scalar registers can also be kept in lanes of
    vector registers, `scalar_spills`: that costs instructions, and memory only if `stack` says so.
    A stack that the compiler has reserved for them, and no instruction touches, is none.
    """

    registers: int
    stack: int
    spilled: int
    scalar_spills: int
    shared: int
    tensor_memory: int = 0


class _Absent:
    """The part of a Triton driver that compiling asks for, of a device that is not here."""

    def __init__(self, architecture: str) -> None:
        if architecture.startswith("gfx"):
            self.target = GPUTarget("hip", architecture, 64)
        else:
            self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self.device = str(self.target)  # kernels keep one cache for each device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[None]:
    """`compiled` inside compiles for `architecture`; nothing can be launched meanwhile."""
    before = driver._active
    driver.set_active(_Absent(architecture))
    try:
        yield
    finally:
        driver._active = before


def compiled(launch: Launch, **options: Any) -> Any:
    """The binary of a recorded launch, the same object for launches that share one."""
    options = launch.options | options
    return launch.kernel.warmup(**launch.arguments, grid=launch.grid, **options)


def usage(binary: Any) -> Usage:
    if "cubin" in binary.asm:
        found = cuda_usage(_cuobjdump(binary.asm["cubin"]), binary.metadata.shared)
        return replace(found, tensor_memory=binary.metadata.tmem_size or 0)
    return amd_usage(binary.asm["amdgcn"], binary.metadata.shared)


def cuda_usage(report: str, dynamic: int) -> Usage:
    """From `cuobjdump -res-usage` of one kernel, and the shared memory it is launched with."""

    def number(name: str) -> int:
        return _number(rf"\b{name}:(\d+)", report)

    fixed = max(0, number("SHARED") - CUDA_RESERVED)
    stack = number("STACK") + number("LOCAL")
    return Usage(number("REG"), stack, stack // 4, 0, fixed + dynamic)


def amd_usage(assembly: str, dynamic: int) -> Usage:
    """From the metadata at the end of the assembly of gfx940 or later."""

    def number(name: str) -> int:
        return _number(rf"^[ -]*\.{name}:\s+(\d+)$", assembly)

    is_touched = re.search(r"^\s*scratch_(load|store)", assembly, re.MULTILINE)
    return Usage(
        number("vgpr_count"),
        number("private_segment_fixed_size") if is_touched else 0,
        number("vgpr_spill_count"),
        number("sgpr_spill_count"),
        number("group_segment_fixed_size") + dynamic,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"binary: expected {pattern} in what is told of it, got {text[-2000:]!r}")
    return int(found[1])


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def figures_of(
    launch: Launch, architecture: str, known: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """`known` keeps what was read of a binary, by its identity: kernels keep binaries alive.

    As a launch does, `launch.keeping_less`: "all_registers" is there if that compiled it again.
    """
    limit = {"limit": SHARED_LIMIT[architecture]}

    def figures(**options: Any) -> dict[str, Any]:
        binary = compiled(launch, **options)
        if id(binary) not in known:
            known[id(binary)] = asdict(usage(binary))
        again = {"all_registers": True} if options else {}
        return {**known[id(binary)], **limit, **again}

    try:
        found = figures()
        if not found["stack"] or architecture.startswith("gfx"):
            return found
        return min(found, figures(**ALL_REGISTERS), key=lambda each: each["stack"])
    except Exception as error:  # whatever the compiler raises belongs into the table
        return {**limit, "error": f"{type(error).__name__}: {error}"[-2000:]}


def complaint(row: dict[str, Any], allowed_stack: int = 0) -> str:
    """Why this kernel cannot ship, or nothing."""
    if "error" in row:
        return f"does not compile: {row['error'].strip().splitlines()[-1]}"
    found = []
    if max(row["stack"], 4 * row["spilled"]) > allowed_stack:
        found.append(f"keeps {row['stack']} bytes of each thread in memory")
    if row["shared"] > row["limit"]:
        found.append(f"wants {row['shared']} bytes of shared memory, {row['limit']} there are")
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"wants {row['tensor_memory']} columns of tensor memory, 512 there are")
    if any(size > most for size, most in zip(row["grid"], GRID_LIMIT, strict=False)):
        found.append(f"wants a grid of {row['grid']}, {GRID_LIMIT} is the largest")
    return "; ".join(found)
