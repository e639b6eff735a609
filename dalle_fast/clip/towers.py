"""The two transformers of OpenAI's CLIP: of pictures and of texts.

    x += to_out(attention(attn_norm(x)))      x += w_out(gelu(w_in(ff_norm(x))))

A picture is read by its class token, which sees every patch; a text, causally, by its end token. QuickGELU is
x sigmoid(1.702 x), with which OpenAI trained; others trained with the exact GELU, and no tensor tells.

Source: Radford et al. 2021; the tensor names and sizes of OpenAI's published models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast import patterns
from dalle_fast.models.alone import widened
from dalle_fast.ops.sparse_attention import sparse_attention
from dalle_fast.patterns import AttentionPattern


class Norm(nn.LayerNorm):
    """LayerNorm in float32 at least, whatever the dtypes of its input and weights; the result is of the input's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        weight, bias = widened(self.weight), widened(self.bias)
        normed = F.layer_norm(widened(x), self.normalized_shape, weight, bias, self.eps)  # type: ignore[arg-type]
        return normed.to(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what came in.

    Args: width: C.   heads: H; they divide C.   hidden: width inside the feed-forward.   eps: of the norms.
    """

    def __init__(
        self, width: int, *, heads: int, hidden: int, pattern: AttentionPattern, quick_gelu: bool, eps: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.pattern = pattern
        self.quick_gelu = quick_gelu
        self.attn_norm = Norm(width, eps)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.ff_norm = Norm(width, eps)
        self.w_in = nn.Linear(width, hidden)
        self.w_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        qkv = self.to_qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        attended = sparse_attention(q, k, v, pattern=self.pattern)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        hidden = self.w_in(self.ff_norm(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        return x + self.w_out(hidden)


class ImageTower(nn.Module):
    """Pictures [B, 3, S, S], normalised -> features [B, embed_dim]."""

    def __init__(
        self, *, image_size: int, patch_size: int, width: int, layers: int, heads: int, hidden: int, embed_dim: int,
        quick_gelu: bool, eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        n_tokens = (image_size // patch_size) ** 2 + 1
        self.to_patches = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_emb = nn.Parameter(torch.randn(width) * width**-0.5)
        self.pos_emb = nn.Parameter(torch.randn(n_tokens, width) * width**-0.5)
        self.norm_in = Norm(width, eps)
        pattern = patterns.make("bidirectional", text_len=n_tokens, grid=(1, 1))  # the one image position stays unused
        self.blocks = _blocks(
            layers, width, heads=heads, hidden=hidden, pattern=pattern, quick_gelu=quick_gelu, eps=eps
        )
        self.norm_out = Norm(width, eps)
        self.to_latent = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.to_latent.weight, std=width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, embed_dim]."""
        patches = self.to_patches(images.to(self.to_patches.weight.dtype)).flatten(2).transpose(1, 2)  # [B, N - 1, C]
        first = self.class_emb.to(patches.dtype).expand(len(images), 1, -1)
        x = self.norm_in(torch.cat([first, patches], dim=1) + self.pos_emb.to(patches.dtype))
        for block in self.blocks:
            x = block(x)
        return self.to_latent(self.norm_out(x[:, 0]))


class TextTower(nn.Module):
    """Ids [B, n] -> features [B, embed_dim], at the end token of each text."""

    def __init__(
        self, *, vocab_size: int, context_length: int, width: int, layers: int, heads: int, hidden: int, embed_dim: int,
        quick_gelu: bool, eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Parameter(torch.randn(context_length, width) * 0.01)
        pattern = patterns.make("full", text_len=context_length, grid=(1, 1))  # the one image position stays unused
        self.blocks = _blocks(
            layers, width, heads=heads, hidden=hidden, pattern=pattern, quick_gelu=quick_gelu, eps=eps
        )
        self.norm_out = Norm(width, eps)
        self.to_latent = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        nn.init.normal_(self.to_latent.weight, std=width**-0.5)

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """ids [B, n], ends [B] (the position of each end token) -> [B, embed_dim]."""
        dtype = self.to_latent.weight.dtype
        x = self.token_emb(ids).to(dtype) + self.pos_emb[: ids.shape[1]].to(dtype)
        for block in self.blocks:
            x = block(x)
        return self.to_latent(self.norm_out(x[torch.arange(len(x), device=x.device), ends]))


def _blocks(
    layers: int, width: int, *, heads: int, hidden: int, pattern: AttentionPattern, quick_gelu: bool, eps: float
) -> nn.ModuleList:
    """`layers` blocks with OpenAI's initial weights."""
    blocks = nn.ModuleList()
    for _ in range(layers):
        block = Block(width, heads=heads, hidden=hidden, pattern=pattern, quick_gelu=quick_gelu, eps=eps)
        inner = width**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(block.to_qkv.weight, std=width**-0.5)
        nn.init.zeros_(block.to_qkv.bias)
        nn.init.normal_(block.to_out.weight, std=inner)
        nn.init.zeros_(block.to_out.bias)
        nn.init.normal_(block.w_in.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.w_out.weight, std=inner)
        blocks.append(block)
    return blocks
