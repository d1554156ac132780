"""Triton's interpreter, where it errs and where it is slow."""

import functools
import inspect
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from iada_kernels.triton import config

# The single-launch loss would take most small problems.
GENERAL = replace(
    config.INTERPRETER, single_launch=replace(config.INTERPRETER.single_launch, classes=0)
)


def cast_through_float32(monkeypatch) -> None:
    """Casts between bfloat16 and float64 as compiled kernels have them, but for a second rounding.

    The interpreter casts between these two by their bits, not by their values.
    """
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self, src, dst_type):
        kinds = {src.dtype.scalar, dst_type.scalar}
        if kinds == {tl.bfloat16, tl.float64}:
            single = (
                tl.block_type(tl.float32, dst_type.shape) if dst_type.is_block() else tl.float32
            )
            src = cast(self, src, single)
        return cast(self, src, dst_type)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)


def patch_language_once(monkeypatch) -> None:
    """What `tl` holds is replaced once a launch, not at each call of a device function too.

    The interpreter replaces it when a launch begins, puts it back when it ends, and in between
    looks through all of it again whenever one jitted function calls another: half of the time of
    small tiles, and nothing is left to replace.
    """
    patch = interpreter._patch_lang

    @functools.cache
    def languages(function: FunctionType) -> list[ModuleType]:
        found = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return [module for module in found if module in (tl, tl.core)]

    @functools.wraps(patch)
    def patch_lang(function: FunctionType) -> Any:
        if any(tl.core.is_builtin(module.load) for module in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()  # of nothing

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
