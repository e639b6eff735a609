"""The strong peer of decoding: a static-cache decoder of our model in plain torch, written to be compiled.

As a good practitioner writes one, in the manner of gpt-fast: keys and values [B, H, N, D] of every position allocated
once, a token's step of one fixed shape with the position in a tensor, torch's SDPA under the row of a dense mask, token
shift from a buffer of normed activations, the image half of the head, Gumbel-max in the same graph. One compiled graph
steps all image tokens; the prompt is read once and its keys and values are copied to every sample.

It knows nothing of patterns but their masks, so a step reads the whole cache, N slots of each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.token_shift import shift_tokens

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles nothing."""
    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with what was found fastest on CPUs: weights frozen and packed, products chosen by trial."""
    from torch._inductor import config, select_algorithm  # the compiler: seconds to import

    select_algorithm.PRINT_AUTOTUNE = False
    ready: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False)

    fresh = [True]

    def call(*arguments: Any) -> Any:
        if not fresh:
            return ready(*arguments)
        fresh.clear()
        # Not by `options`: only what holds while dynamo traces leaves parameters free to be frozen.
        with config.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN"):
            return ready(*arguments)

    return call


class StaticCacheDecoder(nn.Module):
    """Decodes `batch` samples of one prompt with the weights of `model` (shared, not copied).

    Args:
        model: rotary, token shift, one module a layer, none of sandwich norm, `stable`, reversible blocks.
        batch: B, samples.
        compile: turns a step, and the reading of a prompt, into what runs.
    """

    tokens: Tensor
    place: Tensor
    cosines: Tensor
    sines: Tensor

    def __init__(self, model: DALLE, batch: int, *, compile: Compile = as_it_is) -> None:
        super().__init__()
        self.model = model.eval()
        self.layout = model.layout
        blocks: Any = model.transformer.blocks
        self.blocks = list(blocks)
        attention = self.blocks[0].attn.fn
        self.products = model.to_logits.weight.dtype.itemsize < 4  # torch's SDPA takes 16 bits a third as fast
        self.heads, self.dim_head = attention.heads, attention.dim_head
        first = model.to_logits.weight  # the VAE stays float32
        n = self.layout.max_inputs
        dense = {block.attn.fn.pattern: block.attn.fn.pattern.dense(n).to(first.device) for block in self.blocks}
        self.masks = [dense[block.attn.fn.pattern] for block in self.blocks]
        angles = model.transformer.angles
        assert angles is not None
        angles = F.pad(angles[:n], (0, self.dim_head - angles.shape[1]))
        self.cosines, self.sines = angles.cos()[:, None], angles.sin()[:, None]  # [N, 1, D], float32

        shape = batch, self.heads, n, self.dim_head
        kept = 2 * -(-self.model.logits_norm.normalized_shape[0] // 4)
        before = batch, self.layout.grid_cols + self.layout.n_image, kept  # a row of zeros above the first
        self.keys = [first.new_zeros(shape) for _ in self.blocks]
        self.values = [first.new_zeros(shape) for _ in self.blocks]
        self.shifts = [first.new_zeros(before) for _ in range(2 * len(self.blocks))]
        self._step = compile(self._step_of_all)
        self._read = compile(self._read_of_all)

    # -------------------------------------------------------------------------------------------- the interface

    @torch.no_grad()
    def prefill(self, text: Tensor) -> Tensor:
        """Reads one prompt [1, T] for all samples; logits [1, K] of the first image token."""
        return self.fill(text, text[:, :0], read=self._read)

    @torch.no_grad()
    def fill(self, text: Tensor, codes: Tensor, *, read: Callable[..., Any] | None = None) -> Tensor:
        """Reads a prompt [1, T] and codes [b, n] behind it, repeated over the B samples; logits [b, K] of what follows.

        Not compiled: it puts the cache where a sampled position needs it.
        """
        x = torch.cat((self.model.embed_text(text).expand(len(codes), -1, -1), self.model.embed_image(codes)), dim=1)
        x = x[:, : self.layout.max_inputs]
        logits, *memory = (self._read_of_all if read is None else read)(x)
        n, cols = x.shape[1], self.layout.grid_cols
        for kept, found in ((self.keys, memory[0]), (self.values, memory[1])):
            for cache, new in zip(kept, found, strict=True):
                cache[:, :, :n] = _repeated(new, len(cache))
        for cache, new in zip(self.shifts, memory[2], strict=True):
            cache[:, cols : cols + n - self.layout.text_len] = _repeated(new, len(cache))
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Reads image tokens [B] at `place`, an int64 scalar tensor; (the next tokens [B], the logits [B, K])."""
        return self._step(tokens, place, self.keys, self.values, self.shifts)

    def drawn(self, logits: Tensor) -> Tensor:
        """Gumbel-max of [B, K]: argmax of logits - log(exponential noise)."""
        logits = logits.float()
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)

    # -------------------------------------------------------------------------------------------- one token

    def _step_of_all(
        self, tokens: Tensor, place: Tensor, keys: list[Tensor], values: list[Tensor], shifts: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x = self.model.image_emb(tokens)  # [B, C]
        position = (place + self.layout.text_len).view(1)
        for layer, block in enumerate(self.blocks):
            normed = self._shifted(block.attn.norm(x), place, shifts[2 * layer])
            out = self._attended(layer, normed, position, keys[layer], values[layer])
            x = x + block.attn.fn.to_out(out) * block.attn.scale[0]
            normed = self._shifted(block.ff.norm(x), place, shifts[2 * layer + 1])
            x = x + block.ff.fn(normed) * block.ff.scale[0]
        logits = self._image_logits(x)
        return self.drawn(logits), logits

    def _shifted(self, normed: Tensor, place: Tensor, kept: Tensor) -> Tensor:
        """[B, C]: a quarter from the token above, a quarter from the left, the rest its own."""
        width, cols = kept.shape[2], self.layout.grid_cols
        place = place.view(1)
        kept.index_copy_(1, place + cols, normed[:, None, :width])
        above = kept.index_select(1, place)[:, 0, : width // 2]
        left = kept.index_select(1, place + (cols - 1))[:, 0, width // 2 :]
        left = torch.where(place % cols == 0, torch.zeros_like(left), left)
        return torch.cat((above, left, normed[:, width:]), dim=-1)

    def _attended(self, layer: int, normed: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        qkv = self.blocks[layer].attn.fn.to_qkv(normed).unflatten(-1, (3, self.heads, self.dim_head))  # [B, 3, H, D]
        qkv = _turned(qkv, self.cosines.index_select(0, position), self.sines.index_select(0, position))
        q, k, v = (t[:, :, None] for t in qkv.unbind(1))  # [B, H, 1, D]
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        mask = self.masks[layer].index_select(0, position)[None, None]  # [1, 1, 1, N]
        if self.products:
            scores = (q @ keys.transpose(-1, -2)).float() * self.dim_head**-0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
            return (weights.to(values.dtype) @ values).flatten(1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1)

    # -------------------------------------------------------------------------------------------- a prefix

    def _read_of_all(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Embeddings [b, n, C] -> logits [b, K] of what follows; keys, values [b, H, n, D]; what shifts remember."""
        n, text_len = x.shape[1], self.layout.text_len
        keys, values, shifts = [], [], []
        for layer, block in enumerate(self.blocks):
            normed = block.attn.norm(x)
            shifts.append(normed[:, text_len:, : self.shifts[0].shape[2]])
            qkv = block.attn.fn.to_qkv(shift_tokens(normed, self.layout)).unflatten(-1, (3, self.heads, self.dim_head))
            qkv = _turned(qkv, self.cosines[:n, None], self.sines[:n, None])
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[layer][:n, :n])
            x = x + block.attn.fn.to_out(out.transpose(1, 2).flatten(2)) * block.attn.scale
            normed = block.ff.norm(x)
            shifts.append(normed[:, text_len:, : self.shifts[0].shape[2]])
            x = x + block.ff.fn(shift_tokens(normed, self.layout)) * block.ff.scale
            keys.append(k)
            values.append(v)
        return self._image_logits(x[:, -1]), keys, values, shifts

    def _image_logits(self, hidden: Tensor) -> Tensor:
        head, first = self.model.to_logits, self.model.num_text_tokens
        return F.linear(self.model.logits_norm(hidden), head.weight[first:], head.bias[first:])


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs of channels turned, in float32 as the angles are; [..., D] of the dtype of x."""
    wide = x.float()
    even, odd = wide[..., 0::2], wide[..., 1::2]
    crossed = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (wide * cosines + crossed * sines).to(x.dtype)


def _repeated(x: Tensor, batch: int) -> Tensor:
    """[b, ...] repeated along the first dimension to [B, ...]."""
    return x.repeat(-(-batch // len(x)), *[1] * (x.dim() - 1))[:batch]
