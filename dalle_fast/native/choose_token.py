"""One token from its logits in C++ (csrc/cpu/choose_token*), in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dalle_fast import _extension

_I64 = ctypes.c_int64


class TokenChoice(ctypes.Structure):
    """TokenChoice of csrc/cpu/choose_token.h."""

    _fields_ = [
        *(("n_codes", _I64), ("top_k", _I64), ("temperature", ctypes.c_float), ("top_p", ctypes.c_double)),
        ("stream", ctypes.c_uint32),
    ]

    @classmethod
    def of(
        cls, n_codes: int, stream: int, *, top_k: int | None, temperature: float, top_p: float | None
    ) -> TokenChoice:
        """Filters as `dalle_fast.ops.choose_token` takes them; None keeps all."""
        # An int64 there, any int here.
        k = 0 if top_k is None else min(top_k, n_codes)
        return cls(n_codes, k, temperature, 1.0 if top_p is None else top_p, stream)


def choose_token(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    *,
    top_k: int | None,
    temperature: float,
    top_p: float | None,
) -> Tensor:
    """int64 [B]: arguments as `dalle_fast.ops.choose_token`, checked there; 16-bit logits are converted first."""
    logits, seeds, positions = logits.float().contiguous(), seeds.contiguous(), positions.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    choice = TokenChoice.of(logits.shape[1], stream, top_k=top_k, temperature=temperature, top_p=top_p)
    function = _extension.library().dalle_fast_choose_tokens
    pointers = (tensor.data_ptr() for tensor in (seeds, positions, tokens))
    status = function(ctypes.addressof(choice), logits.data_ptr(), len(logits), *pointers)
    _extension.check(status, "choose_token")
    return tokens
