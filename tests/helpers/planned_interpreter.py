"""Plans and replays in Triton's interpreter: in place of binaries stand interpreted calls.

A replay gives kernels addresses where the call before gave tensors, and plain tuples for records.
Both are turned back here, so that what is computed there can be compared.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.compiler import CompiledKernel

from iada_kernels.triton import launch, plans


class Interpreted(CompiledKernel):
    """A kernel with the constants of a launch."""

    module = None

    def __init__(self, kernel: Any, example: tuple[Any, ...]) -> None:
        self.kernel, self.example = kernel, tuple(map(_without_memory, example))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*arguments: Any, stream: Any) -> None:
            with _disable_current_modes():  # the interpreter copies by torch's operators
                self.kernel[grid](*map(_as_given, arguments, self.example))

        return start


def _without_memory(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_without_memory, value))
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _as_given(value: Any, example: Any) -> Any:
    """`value` as `example` was."""
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        return type(example)(*map(_as_given, value, example))
    if isinstance(example, Tensor) and not isinstance(value, Tensor):
        memory = (ctypes.c_char * example.nbytes).from_address(value)
        return torch.frombuffer(memory, dtype=example.dtype).view(example.shape)
    return value


def plan_in_the_interpreter(monkeypatch: Any) -> None:
    """From here on operations are planned as on a GPU."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))

    def interpreted(binary: None, again: Any) -> Interpreted:
        kernel, constants = again.func.__self__, again.keywords
        names = kernel.arg_names[len(again.args) :]
        return Interpreted(kernel, (*again.args, *(constants[name] for name in names)))

    monkeypatch.setattr(launch, "keeping_less", interpreted)
    monkeypatch.setattr(plans, "starter", Interpreted.__getitem__)
