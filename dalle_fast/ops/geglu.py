"""GEGLU: the contract of its argument, the choice of implementation, the registration.

"reference" is plain torch and differentiates itself; it saves GELU's result and the product beside x. "cpu" is C++
behind a custom op that saves x alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast import dispatch
from dalle_fast.native import geglu as native
from dalle_fast.ops.checks import dtype_name
from dalle_fast.ops.support import refuse_second_derivative, supports_cpu
from dalle_fast.reference import geglu as reference

OP = "geglu"


def geglu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """value * GELU(gate) of the two halves of the last axis, value first.

    Args:
        x: floating [..., 2 W].   impl: "auto", or the name of one implementation.
    Returns: [..., W], dtype of x.
    Raises: TypeError (dtype), ValueError (an odd last axis), NotImplementedError (impl lacks it), RuntimeError (no
        extension, second derivative).
    Numerics: the exact GELU; "cpu" computes 16-bit inputs in float32 and rounds once.
    Source: DALLE-pytorch GEGLU; Shazeer, GLU Variants Improve Transformer.
    """
    if not x.is_floating_point():
        raise TypeError(f"{OP}: x must be floating, got {dtype_name(x)}. Convert it with .to(dtype).")
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{OP}: x must be [..., 2 W], got {list(x.shape)}. Give values and gates side by side.")
    return dispatch.choose(OP, impl, **facts(x)).function(x)


def facts(x: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("geglu", **facts(x))`."""
    return {"device": x.device.type, "dtype": x.dtype}


@torch.library.custom_op("dalle_fast::geglu", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    return native.forward(x)


@torch.library.custom_op("dalle_fast::geglu_backward", mutates_args=())
def _backward(dout: Tensor, x: Tensor) -> Tensor:
    return native.backward(dout, x)


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_backward.register_fake
def _(dout: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> Tensor:
    gradient: Tensor = _backward(dout, *ctx.saved_tensors)
    return gradient


torch.library.register_autograd("dalle_fast::geglu", _differentiate, setup_context=_save)
torch.library.register_autograd("dalle_fast::geglu_backward", refuse_second_derivative(OP))

dispatch.register(OP, "reference", reference.geglu)
dispatch.register(OP, "cpu", _forward, supports=supports_cpu, rank=1)
