"""bfloat16 in Triton's interpreter, which keeps it as uint16 and would add, multiply and compare those integers.

Every operation on it widens to float32, computes there, and rounds to nearest even, as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

_COMPUTING = ("unary_op", "binary_op", "ternary_op", "create_fma", "create_dot")
_NAN = np.uint16(0x7FC0)

Operation = Callable[..., TensorHandle]


def round_to_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the uint16 of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Half a unit less one, and one more where the last bit kept is odd: a tie moves odd numbers only.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), _NAN, rounded.astype(np.uint16))


def widen_bits(bits: np.ndarray) -> np.ndarray:
    """The uint16 of bfloat16 -> float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Replaces the builder's operations by ones that know bfloat16. `interpreter.install` calls it, once."""
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _casting(getattr(InterpreterBuilder, name)))
    for name in _COMPUTING:
        setattr(InterpreterBuilder, name, _computing_wide(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.get_bf16 = _constant  # a literal: Triton 3.6 has none
    for operations in (ReduceOps, ScanOps):
        operations.apply_impl = _refusing(operations.apply_impl)


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    return TensorHandle(widen_bits(value.data), tl.float32) if _is_bfloat16(value) else value


def _round(value: TensorHandle) -> TensorHandle:
    return TensorHandle(round_to_bits(value.data.astype(np.float32)), tl.bfloat16)


def _constant(builder: InterpreterBuilder, value: float) -> TensorHandle:
    return _round(builder.get_fp32(value))


def _casting(cast: Operation) -> Operation:
    def mended(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, *rounding_mode: Any) -> TensorHandle:
        if _is_bfloat16(source) and to.scalar != tl.bfloat16:
            wide = _widen(source)
            return wide if to.scalar == tl.float32 else cast(self, wide, to, *rounding_mode)
        if to.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return _round(source)
        return cast(self, source, to, *rounding_mode)

    return mended


def _computing_wide(compute: Operation) -> Operation:
    def mended(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        tensors = [value for value in operands if isinstance(value, TensorHandle)]
        if not any(map(_is_bfloat16, tensors)):
            return compute(self, *operands)
        result = compute(self, *map(_widen, operands))
        # The last operand has the type of the result (the accumulator of a dot is float32), but for comparisons.
        return _round(result) if _is_bfloat16(tensors[-1]) and result.data.dtype != np.bool_ else result

    return mended


def _refusing(apply: Callable) -> Callable:
    def checked(self: ReduceOps | ScanOps, tensors: tuple[tl.tensor, ...]) -> Any:
        if any(_is_bfloat16(tensor.handle) for tensor in tensors):
            raise TypeError("tl.reduce and tl.associative_scan of bfloat16 lose accuracy: widen to float32 first.")
        return apply(self, tensors)

    return checked
