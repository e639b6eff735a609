"""Sparse attention by its Triton launchers, with launch sizes of the test's choice, as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dalle_fast.kernels.sparse_attention import launch_backward, launch_forward
from dalle_fast.kernels.sparse_attention_sizes import Launch, Sizes
from tolerance import check_against_oracle
from torch import Tensor

from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference.sparse_attention import sparse_attention as oracle

# Blocks so small that a short sequence has several of each kind, and text walks that are cut in two.
SMALL = Launch(Sizes(16, 16, 4, 1), Sizes(16, 16, 4, 1), Sizes(16, 16, 4, 1), longest=2, apart=True)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = launch_forward(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        return *launch_backward(dout, *ctx.saved_tensors, **ctx.options), None


def attention(
    pattern: AttentionPattern,
    *,
    launch: Launch = SMALL,
    key_mask: Tensor | None = None,
    scale: float = 0.25,
    rotary: Tensor | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v [B, H, N, D] -> out."""
    options = {"pattern": pattern, "key_mask": key_mask, "scale": scale, "rotary": rotary, "launch": launch}
    return lambda q, k, v: _SparseAttention.apply(q, k, v, options)


def check(qkv: tuple[Tensor, ...], dtype: torch.dtype, pattern: AttentionPattern, *, launch: Launch, **options) -> None:
    """Output and gradients of the kernels are within the budget of the oracle."""

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return oracle(q, k, v, pattern=pattern, **{"key_mask": None, "scale": 0.25, "rotary": None, **options})

    check_against_oracle(attention(pattern, launch=launch, **options), exact, qkv, dtype)
