"""CLIP: text and pictures in one latent space, trained by contrast; ranks what DALLE draws.

    similarity = exp(temperature) * <text latent / |text latent|, image latent / |image latent|>

Source: DALLE-pytorch's CLIP (Radford et al. 2021): two bidirectional transformers, means over their positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle_fast.models.alone import computed_alone, each_alone, in_float32
from dalle_fast.models.saving import PathLike, Pretrained
from dalle_fast.models.transformer import Transformer

_OF_OPENAI = (
    "OpenAI's, another architecture: class token and end token where this one takes means over positions, GELU where "
    "this one has GEGLU, patches in another order. Load it with dalle_fast.clip.load."
)


class CLIP(Pretrained):
    """Scores how well pictures fit texts.

    Args:
        dim_text, dim_image, dim_latent: widths of the two transformers and of the space they share.
        num_text_tokens: size of the text vocabulary.   text_seq_len: longest text.
        text_enc_depth, text_heads, visual_enc_depth, visual_heads: blocks and heads; a head is 64 wide.
        num_visual_tokens: accepted for old code, without effect: pictures come as pixels.
        visual_image_size, visual_patch_size: side of a picture and of its patches, in pixels.
        channels: of a picture.
    Raises: ValueError (patches that do not divide the picture).
    """

    def __init__(
        self,
        *,
        dim_text: int = 512,
        dim_image: int = 512,
        dim_latent: int = 512,
        num_text_tokens: int = 10000,
        text_enc_depth: int = 6,
        text_seq_len: int = 256,
        text_heads: int = 8,
        num_visual_tokens: int = 512,
        visual_enc_depth: int = 6,
        visual_heads: int = 8,
        visual_image_size: int = 256,
        visual_patch_size: int = 32,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if visual_patch_size < 1 or visual_image_size % visual_patch_size:
            raise ValueError(
                f"CLIP: visual_patch_size must divide visual_image_size={visual_image_size}, got {visual_patch_size}."
            )
        self.text_seq_len = text_seq_len
        self.num_text_tokens = num_text_tokens
        self.visual_image_size = visual_image_size
        self.visual_patch_size = visual_patch_size
        self.channels = channels

        self.text_emb = nn.Embedding(num_text_tokens, dim_text)
        self.text_pos_emb = nn.Embedding(text_seq_len, dim_text)
        self.text_transformer = _encoder(dim_text, text_enc_depth, text_heads, text_seq_len)
        self.to_text_latent = nn.Linear(dim_text, dim_latent, bias=False)

        n_patches = (visual_image_size // visual_patch_size) ** 2
        self.to_visual_embedding = nn.Linear(channels * visual_patch_size**2, dim_image)
        self.visual_pos_emb = nn.Embedding(n_patches, dim_image)
        self.visual_transformer = _encoder(dim_image, visual_enc_depth, visual_heads, n_patches)
        self.to_visual_latent = nn.Linear(dim_image, dim_latent, bias=False)

        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(
        self, text: Tensor, image: Tensor, text_mask: Tensor | None = None, return_loss: bool = False
    ) -> Tensor:
        """Similarity of each text to its picture, or the loss that pulls pairs together and all else apart.

        Args:
            text: ids [B, n], n <= text_seq_len, int32 or int64.
            image: [B, channels, visual_image_size, visual_image_size], floating. Of text and image one may have B = 1
                and is then compared with every one of the other (not with return_loss).
            text_mask: bool [B, n], True = a token; at least one in each row.
            return_loss: the mean of the two cross entropies over the batch, scalar, instead of similarities [B].
        Raises: TypeError (dtype), ValueError (shape, id, batch size, a row with no token).
        Numerics: on CPUs the bits of a similarity depend on its text, mask, picture and the weights alone, not on its
            batch or the number of threads, and a text that comes again is read once; 16-bit models compute it in
            float32 and round it.
        Source: DALLE-pytorch CLIP.forward, which gives NaN for a masked row.
        """
        self._check_text(text, text_mask)
        self._check_image(image)
        n_texts, n_images = len(text), len(image)
        if n_texts != n_images and (return_loss or 1 not in (n_texts, n_images)):
            raise ValueError(
                f"CLIP: text and image must be pairs, got {n_texts} texts and {n_images} pictures."
                + (" Without return_loss, one of either may be compared with many." if return_loss else "")
            )
        if return_loss and n_texts == 0:
            raise ValueError("CLIP: return_loss needs at least one pair, got an empty batch. Skip it.")

        if not return_loss and computed_alone(text) and computed_alone(image):
            return self._similarities(text, image, text_mask)
        text_latents = self._text_latents(text, text_mask)
        image_latents = self._image_latents(image)
        scale = self.temperature.exp()
        if not return_loss:
            return (text_latents * image_latents).sum(-1) * scale
        similarity = text_latents @ image_latents.t() * scale  # [texts, pictures]
        pairs = torch.arange(n_texts, device=text.device)
        return (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.t(), pairs)) / 2

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As of every model here; weights of OpenAI's CLIP are refused: no renaming makes them this architecture.

        Raises: ValueError (such weights, a tensor of another shape), RuntimeError (strict: missing, unknown names).
        """
        from dalle_fast.clip.architecture import is_clip  # at call time: it stands above models

        if isinstance(state_dict, Mapping) and is_clip(state_dict):
            raise ValueError(f"CLIP: state_dict must be of dalle_pytorch's CLIP, got {_OF_OPENAI}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def from_pretrained(
        cls, path: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> CLIP:
        """As of every model here; a file or directory of OpenAI's CLIP is refused: it is another architecture.

        Raises: as of every model, and ValueError (such a file or directory).
        """
        from dalle_fast.clip.loading import holds_clip  # at call time: it stands above models

        if holds_clip(Path(path)):
            raise ValueError(f"CLIP: {path} must hold a CLIP as dalle_pytorch has it, got {_OF_OPENAI}")
        return super().from_pretrained(path, dtype=dtype, device=device)

    def _similarities(self, text: Tensor, image: Tensor, mask: Tensor | None) -> Tensor:
        """forward without the loss: each text and each picture alone, equal texts once."""
        wide = in_float32(self)
        rows = text if mask is None else torch.cat([text, mask.to(text)], dim=1)
        first: dict[tuple[int, ...], int] = {}
        like = [first.setdefault(tuple(row), i) for i, row in enumerate(rows.tolist())]
        distinct = sorted(first.values())

        def latent(job: int) -> Tensor:
            if job < len(distinct):
                row = slice(distinct[job], distinct[job] + 1)
                return wide._text_latents(text[row], None if mask is None else mask[row])
            job -= len(distinct)
            return wide._image_latents(image[job : job + 1].to(wide.temperature.dtype))

        latents = each_alone(latent, len(distinct) + len(image))
        of_text = dict(zip(distinct, latents, strict=False))
        texts, pictures = [of_text[row] for row in like], latents[len(distinct) :]
        n = max(len(texts), len(pictures))
        pairs = zip(texts * (n // len(texts)), pictures * (n // len(pictures)), strict=True)
        scores = torch.cat([(one * other).sum(-1) for one, other in pairs]) * wide.temperature.exp()
        return scores.to(self.temperature.dtype)

    def _text_latents(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Unit vectors [B, dim_latent]."""
        x = self.text_emb(text) + self.text_pos_emb.weight[: text.shape[1]]
        x = self.text_transformer(x, mask=mask)
        if mask is None:
            mean = x.mean(dim=1)
        else:
            mean = x.masked_fill(~mask[..., None], 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(self.to_text_latent(mean), dim=-1)

    def _image_latents(self, image: Tensor) -> Tensor:
        """Unit vectors [B, dim_latent]."""
        size = self.visual_patch_size
        patches = rearrange(image, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=size, p2=size)
        x = self.to_visual_embedding(patches) + self.visual_pos_emb.weight
        x = self.visual_transformer(x)
        return F.normalize(self.to_visual_latent(x.mean(dim=1)), dim=-1)

    def _check_text(self, text: Tensor, mask: Tensor | None) -> None:
        if text.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"CLIP: text must be ids of int64 or int32, got {text.dtype}. Tokenize it first.")
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.text_seq_len:
            raise ValueError(
                f"CLIP: text must be [B, n] with 1 <= n <= text_seq_len={self.text_seq_len}, got {list(text.shape)}. "
                "Cut it, or tokenize with context_length=text_seq_len."
            )
        if text.numel() and not torch.compiler.is_compiling():
            low, high = int(text.min()), int(text.max())
            if low < 0 or high >= self.num_text_tokens:
                raise ValueError(
                    f"CLIP: text ids must be in 0..{self.num_text_tokens - 1}, got {low if low < 0 else high}. "
                    "Was the text encoded with another tokenizer?"
                )
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != text.shape:
            error = TypeError if mask.dtype != torch.bool else ValueError
            raise error(
                f"CLIP: text_mask must be bool {list(text.shape)}, got {mask.dtype} {list(mask.shape)}. "
                "True marks a token, as in text != 0."
            )
        if not torch.compiler.is_compiling() and not bool(mask.any(dim=1).all()):
            row = int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(
                f"CLIP: text_mask must keep a token in every row, got none in row {row}. Leave out the empty text."
            )

    def _check_image(self, image: Tensor) -> None:
        wanted = [self.channels, self.visual_image_size, self.visual_image_size]
        if not image.dtype.is_floating_point:
            raise TypeError(f"CLIP: image must be floating, got {image.dtype}. Convert it with image.float() / 255.")
        if image.dim() != 4 or list(image.shape[1:]) != wanted:
            raise ValueError(
                f"CLIP: image must be [B, {', '.join(map(str, wanted))}], got {list(image.shape)}. "
                "Resize it, or build CLIP with this visual_image_size."
            )


def _encoder(dim: int, depth: int, heads: int, seq_len: int) -> Transformer:
    return Transformer(causal=False, seq_len=seq_len, dim=dim, depth=depth, heads=heads, rotary_emb=False)
