"""GEGLU in C++ (csrc/cpu/geglu*): launchers for 32- and 16-bit floats, CPU. The structure repeats csrc/cpu/geglu.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dalle_fast import _extension

_OP = "geglu"
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Geglu(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("element", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "out", "dout", "dx")),
    ]


def forward(x: Tensor) -> Tensor:
    """x [..., 2 W] -> [..., W], contiguous."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _run("forward", out, x=x, out=out)
    return out


def backward(dout: Tensor, x: Tensor) -> Tensor:
    """dout [..., W] -> the gradient of x [..., 2 W], contiguous."""
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _run("backward", dout, x=x, dout=dout, dx=dx)
    return dx


def _run(what: str, like: Tensor, **tensors: Tensor) -> None:
    """like: [..., W]."""
    if not like.numel():
        return
    width = like.shape[-1]
    call = _Geglu(like.numel() // width, width, _ELEMENTS[like.dtype])
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
    function = getattr(_extension.library(), f"dalle_fast_geglu_{what}")
    _extension.check(function(ctypes.addressof(call)), _OP)
