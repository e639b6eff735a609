"""The training loss of a DALLE, for speed on a CPU: the numbers of DALLE.forward(return_loss=True) in fewer passes.

Sines and cosines are computed once, q, k and v are rotated together before the heads are split, attention is torch's
fused kernel with the pattern as a mask, and the whole is one graph that torch.compile can
take. Sandwich norms, shared layers and rotary are supported; reversible, stable and learned positions are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.token_shift import shift_tokens


class LeanLoss(nn.Module):
    """Called as `LeanLoss(dalle)(text, codes)`: text [B, text_seq_len], codes [B, R * C], both complete.

    Raises: ValueError (a kind of model it does not know).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dalle: DALLE) -> None:
        super().__init__()
        transformer: Any = dalle.transformer
        if transformer.reversible or dalle.stable or dalle.share_input_output_emb or transformer.angles is None:
            raise ValueError(
                "LeanLoss: dalle must have rotary positions, be neither reversible, stable nor tied, got another. "
                "Train it through DALLE.forward."
            )
        self.dalle = dalle
        n = dalle.layout.max_inputs
        angles = transformer.angles[:n].double()
        dtype = dalle.to_logits.weight.dtype
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", _signed(angles.sin()).to(dtype), persistent=False)
        self.masks = [block.attn.fn.pattern.dense(n)[None, None] for block in transformer.blocks]
        self.shifts = transformer.blocks[0].attn.layout is not None

    def forward(self, text: Tensor, codes: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The scalar loss of predicting `codes` behind `inputs` [B, R * C], by default `codes` themselves."""
        dalle: Any = self.dalle
        unique = torch.arange(dalle.num_text_tokens - dalle.text_seq_len, dalle.num_text_tokens)
        text = torch.where(text == 0, unique, text)
        x = torch.cat(
            (dalle.text_emb(F.pad(text, (1, 0))), dalle.image_emb((codes if inputs is None else inputs)[:, :-1])), dim=1
        )
        for block, mask in zip(dalle.transformer.blocks, self.masks, strict=True):
            attn, ff = block.attn, block.ff
            x = x + attn.norm_out(self._attend(attn.fn, self._shift(attn.norm(x)), mask)) * attn.scale
            x = x + ff.norm_out(ff.fn(self._shift(ff.norm(x)))) * ff.scale
        x = dalle.logits_norm(x)
        n_text, n_words = dalle.text_seq_len, dalle.num_text_tokens
        weight, bias = dalle.to_logits.weight, dalle.to_logits.bias
        text_logits = F.linear(x[:, :n_text], weight[:n_words], bias[:n_words])
        image_logits = F.linear(x[:, n_text:], weight[n_words:], bias[n_words:])
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), text.flatten())
        image_loss = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
        return (text_loss + dalle.loss_img_weight * image_loss) / (dalle.loss_img_weight + 1)

    def _shift(self, x: Tensor) -> Tensor:
        return shift_tokens(x, self.dalle.layout) if self.shifts else x

    def _attend(self, attention: Any, x: Tensor, mask: Tensor) -> Tensor:
        batch, n, _ = x.shape
        qkv = attention.to_qkv(x).view(batch, n, 3 * attention.heads, attention.dim_head)
        rot = self.cos.shape[1]
        turned, rest = qkv[..., :rot], qkv[..., rot:]
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned = turned * self.cos[:, None] + swapped * self.sin[:, None]
        q, k, v = torch.cat((turned, rest), dim=-1).transpose(1, 2).chunk(3, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.to_out(out.transpose(1, 2).flatten(2))


def _signed(sines: Tensor) -> Tensor:
    """Sines with the even channel of each pair negated: the swapped pair times this is the quarter turn times sine."""
    return torch.stack((-sines[:, 0::2], sines[:, 1::2]), dim=-1).flatten(1)
