"""The attention layers under dalle_pytorch's names, with its constructor arguments and parameter names.

Inside `DALLE` and `Transformer` one class takes their place (`dalle_fast.models.attention.Attention`); the pattern is
data there. Here each class is that pattern with two projections around `dalle_fast.functional.sparse_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle_fast import patterns
from dalle_fast.ops.sparse_attention import sparse_attention
from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference.sparse_attention import rotate

__all__ = ["Attention", "SparseAttention", "SparseAxialCausalAttention", "SparseConvCausalAttention"]


class _PatternAttention(nn.Module):
    """Projections under the original's names (`to_qkv`, `to_out.0`) around attention by one pattern."""

    def __init__(
        self, dim: int, seq_len: int, pattern: AttentionPattern, heads: int, dim_head: int, dropout: float, stable: bool
    ) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.heads = heads
        self.stable = stable
        self.pattern = pattern
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: [B, N, dim], N <= seq_len.
            mask: bool key mask, True = may attend; [B, N] for every query of `Attention` and `SparseAttention`, [B, T]
                for the image queries of the other two.
            rotary_pos_emb: raw angles [1, >= N, rot], float32.
        Returns: [B, N, dim].
        """
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # each [B, H, N, D]
        rotary = None if rotary_pos_emb is None else rotary_pos_emb.flatten(0, -2)
        out = self._attend(q, k, v, mask, rotary)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Tensor | None) -> Tensor:
        return sparse_attention(q, k, v, pattern=self.pattern, key_mask=mask, stable=self.stable, rotary=rotary)


class Attention(_PatternAttention):
    """Full attention, causal or not.

    Args:
        seq_len: longest sequence.   stable: the original's PB-relax softmax, equal to the plain one.
        static_mask: bool [seq_len, seq_len], True = may attend: further cells to leave out. Such a layer runs on dense
            scores; the patterns of `dalle_fast.patterns` do not.
    """

    static_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        seq_len: int,
        causal: bool = True,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        static_mask: Tensor | None = None,
    ) -> None:
        pattern = patterns.make("full" if causal else "bidirectional", text_len=seq_len, grid=(1, 1))
        super().__init__(dim, seq_len, pattern, heads, dim_head, dropout, stable)
        self.causal = causal
        self.register_buffer("static_mask", static_mask, persistent=False)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Tensor | None) -> Tensor:
        if self.static_mask is None:
            return super()._attend(q, k, v, mask, rotary)
        n = q.shape[2]
        if rotary is not None:
            q, k, v = (rotate(t, rotary) for t in (q, k, v))
        allowed = self.static_mask[:n, :n] & self.pattern.dense(n).to(q.device)
        if mask is not None:
            allowed = allowed & mask[:, None, None, :]
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores.masked_fill(~allowed, -torch.finfo(scores.dtype).max)
        return scores.softmax(dim=-1) @ v


class SparseConvCausalAttention(_PatternAttention):
    """An image token sees all text and the kernel_size x kernel_size cells up and left of it, itself included."""

    def __init__(
        self,
        dim: int,
        seq_len: int,
        image_size: int = 32,
        kernel_size: int = 5,
        dilation: int = 1,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        causal: bool = True,
    ) -> None:
        _check_causal("SparseConvCausalAttention", causal)
        pattern = _over_grid("conv_like", seq_len, image_size, kernel=kernel_size, dilation=dilation)
        super().__init__(dim, seq_len, pattern, heads, dim_head, dropout, stable)
        self.image_size = image_size
        self.kernel_size = kernel_size
        self.dilation = dilation


class SparseAxialCausalAttention(_PatternAttention):
    """An image token sees all text and its row up to itself (axis 0) or its column up to itself (axis 1)."""

    def __init__(
        self,
        dim: int,
        seq_len: int,
        image_size: int = 32,
        axis: int = 0,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        causal: bool = True,
    ) -> None:
        _check_causal("SparseAxialCausalAttention", causal)
        if axis not in (0, 1):
            raise ValueError(f"SparseAxialCausalAttention: axis must be 0 (rows) or 1 (columns), got {axis!r}.")
        pattern = _over_grid(("axial_row", "axial_col")[axis], seq_len, image_size)
        super().__init__(dim, seq_len, pattern, heads, dim_head, dropout, stable)
        self.image_size = image_size
        self.axis = axis


class SparseAttention(_PatternAttention):
    """Blocks of text for everyone, a local window and random blocks, without DeepSpeed.

    Args:
        block_size: positions a block.   text_seq_len: text tokens without `<bos>`.
        num_random_blocks: random blocks a row of blocks; default seq_len // block_size // 4.   seed: draws them.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        causal: bool = True,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        *,
        block_size: int = 16,
        text_seq_len: int = 256,
        num_random_blocks: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_causal("SparseAttention", causal)
        pattern = patterns.make(
            "block_sparse",
            text_len=text_seq_len + 1,
            grid=(1, seq_len - text_seq_len),
            block=block_size,
            num_random_blocks=seq_len // block_size // 4 if num_random_blocks is None else num_random_blocks,
            seed=seed,
        )
        super().__init__(dim, seq_len, pattern, heads, dim_head, dropout, stable)
        self.block_size = block_size
        self.causal = causal


def _over_grid(name: str, seq_len: int, image_size: int, **options: int) -> AttentionPattern:
    """A pattern over the original's sequence: seq_len = text tokens + image tokens, `<bos>` not counted."""
    text_len = seq_len + 1 - image_size**2
    if text_len < 1:
        raise ValueError(
            f"{name}: seq_len must be at least image_size ** 2 = {image_size**2}, got {seq_len}. "
            "It counts text and image tokens."
        )
    return patterns.make(name, text_len=text_len, grid=(image_size, image_size), **options)  # type: ignore[arg-type]


def _check_causal(name: str, causal: bool) -> None:
    if not causal:
        raise ValueError(
            f"{name}: causal must be True, got {causal!r}. Use Attention for attention in both directions."
        )
