"""Triton's interpreter casts between float64 and bfloat16 by their bits, not by their values."""

import triton.language as tl
from triton.runtime import interpreter


def cast_through_float32(monkeypatch) -> None:
    """bfloat16 to and from float64 as compiled kernels have it, but for a second rounding."""
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
