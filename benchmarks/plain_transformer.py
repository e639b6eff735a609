"""The strong peer of training: a plain decoder of a DALLE's size in plain torch, written to be compiled.

As a good practitioner writes one, in the manner of nanoGPT: pre-norm, torch's causal SDPA in every layer, GEGLU
feed-forward, learnt positions, one head over text and image codes and one cross entropy over all its logits. It has
neither the patterns nor rotary positions, token shift or LayerScale, and so none of their cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainTransformer(nn.Module):
    """The loss of a sequence of `length` tokens of one vocabulary.

    Args: sizes as of `dalle_fast.DALLE`; n_tokens: of text and image codes together.
    """

    def __init__(self, *, dim: int, depth: int, heads: int, dim_head: int, n_tokens: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, dim)
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, dim_head) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, n_tokens)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean loss in nats a token of int64 [B, N] tokens that predict labels [B, N]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class PlainBlock(nn.Module):
    """Attention and feed-forward, each normed before and added after."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        self.w_in = nn.Linear(dim, 8 * dim)
        self.w_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(out.transpose(1, 2).flatten(2))
        value, gate = self.w_in(self.norm(x)).chunk(2, dim=-1)
        return x + self.w_out(value * F.gelu(gate))


def by_hand(model: PlainTransformer, tokens: Tensor, labels: Tensor) -> Tensor:
    """The same loss, written a second time with a dense mask and the definitions of softmax and cross entropy."""
    n = tokens.shape[1]
    allowed = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril()
    x = model.tokens.weight[tokens] + model.positions.weight[:n]
    for block in model.blocks:
        assert isinstance(block, PlainBlock)
        q, k, v = (
            t.unflatten(-1, (block.heads, -1)).transpose(1, 2)
            for t in (block.attention_norm(x) @ block.to_qkv.weight.T).chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
        x = x + block.to_out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        value, gate = block.w_in(block.norm(x)).chunk(2, dim=-1)
        x = x + block.w_out(value * gate * (1 + torch.erf(gate * 0.5**0.5)) / 2)
    logits = model.head(model.norm(x))
    return (logits.logsumexp(dim=-1) - logits.gather(-1, labels[..., None])[..., 0]).mean()
