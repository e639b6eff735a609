"""Multi-head attention and feed-forward: the two functions a transformer block scales and adds.

Source: DALLE-pytorch's Attention, SparseAxialCausalAttention, SparseConvCausalAttention (one class here, the pattern is
data) and FeedForward with GEGLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.models.cache import KVCache, LayerCache
from dalle_fast.ops.geglu import geglu
from dalle_fast.ops.sparse_attention import sparse_attention
from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference.sparse_attention import turn_pairs


class Attention(nn.Module):
    """Projects to queries, keys and values, attends by `pattern`, projects back.

    Args:
        dim: C, channels of the activations.
        pattern: which keys a query sees.
        heads, dim_head: H, D.
        dropout: after the output projection.
        stable: the original's PB-relax softmax, equal to the plain one.
    """

    def __init__(
        self,
        dim: int,
        *,
        pattern: AttentionPattern,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("dim_head", dim_head)):
            if value < 1:
                raise ValueError(f"Attention: {name} must be at least 1, got {value}.")
        self.pattern = pattern
        self.heads = heads
        self.dim_head = dim_head
        self.stable = stable
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C]; `mask` is the key mask, `rotary` the raw angles of every position."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, self.dim_head))  # [B, N, 3, H, D]
        if cache is None:
            # Unbound as they lie: the backward pass then puts the three gradients together in one copy, in that order.
            q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
            out = sparse_attention(q, k, v, pattern=self.pattern, key_mask=mask, stable=self.stable, rotary=rotary)
        else:
            out = self._cached(qkv.permute(2, 0, 3, 1, 4), rotary, cache)
        return self.dropout(self.to_out(out.transpose(1, 2).flatten(2)))

    def _cached(self, qkv: Tensor, rotary: Tensor | None, cache: LayerCache) -> Tensor:
        """qkv [3, B, H, N, D], N positions behind the cache's -> [B, H, N, D]."""
        start, n = cache.offset, qkv.shape[3]
        if rotary is not None:
            qkv = turn_pairs(qkv, cache.state.turns(rotary, qkv.dtype)[start : start + n])
        q, k, v = qkv
        kept = cache.keys(self.pattern, k)
        kept.write(qkv[1:], start)
        if start == 0:
            return sparse_attention(q, k, v, pattern=self.pattern, stable=self.stable)
        if n == 1:
            return attend_window(q, kept, start)
        keys, values, allowed = kept.union_window(start, n)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)


def attend_window(q: Tensor, kept: KVCache, position: int) -> Tensor:
    """One query [B, H, 1, D] over its window, which lies in one or two pieces of the cache."""
    pieces = kept.window(position)
    if len(pieces) == 1:
        return F.scaled_dot_product_attention(q, *pieces[0])
    scale = q.shape[-1] ** -0.5
    scores = [q @ k.transpose(-1, -2) for k, _ in pieces]  # [B, H, 1, W]
    weights = (torch.cat(scores, dim=-1) * scale).softmax(dim=-1)
    parts = weights.split([k.shape[2] for k, _ in pieces], dim=-1)
    out = parts[0] @ pieces[0][1]
    for weight, (_, v) in zip(parts[1:], pieces[1:], strict=True):
        out = out + weight @ v
    return out


class FeedForward(nn.Module):
    """C -> 2 * mult * C, GEGLU with the exact GELU, -> C."""

    def __init__(self, dim: int, *, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, dim * mult * 2)
        self.dropout = nn.Dropout(dropout)
        self.w_out = nn.Linear(dim * mult, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        return self.w_out(self.dropout(geglu(self.w_in(x))))
