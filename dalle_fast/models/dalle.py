"""DALL-E: one transformer over text tokens and image codes, and a VAE that turns codes into pixels.

Source: DALLE-pytorch's DALLE. Defects of the original that are mended here are listed in docs/upstream.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.layout import TokenLayout
from dalle_fast.models.cache import DecodeCache
from dalle_fast.models.checks import check_image_shape, checked_ids, checked_labels, checked_text
from dalle_fast.models.inner_vae import not_narrowed, pixels_for, without_vae
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.transformer import DivideMax, Transformer
from dalle_fast.models.vae_protocol import check_vae
from dalle_fast.ops.vocab_cross_entropy import vocab_cross_entropy

_RELAXED = 0.1  # share of the gradient that reaches the embeddings in `stable` models (PB-relax)


class DALLE(Pretrained):
    """Models text tokens and image codes as one sequence; draws images by sampling codes after a text.

    Args:
        dim: C, channels.
        vae: a DiscreteVAE, or any object with its image_size, num_tokens, num_layers, channels, get_codebook_indices
            and decode; it is frozen, and stays float32 where the model is converted to 16 bits.
        num_text_tokens: size of the text vocabulary, id 0 is padding.
        text_seq_len: text tokens a prompt is padded to.
        depth: transformer blocks.
        heads, dim_head: attention heads, their width.
        reversible: recompute activations in the backward pass.
        attn_dropout, ff_dropout: probabilities.
        attn_types: names cycled over the blocks: full, axial_row, axial_col, conv_like, sparse, paper_row, paper_col,
            paper_conv; options of `patterns.make` may follow: "conv_like kernel=7".
        loss_img_weight: weight of the image loss against 1 for the text loss.
        stable: PB-relax.
        sandwich_norm: norm the outputs of blocks too.
        shift_tokens, rotary_emb: token shift, rotary positions.   rotary_dtype: as of `Transformer`.
        shared_attn_ids, shared_ff_ids: one id a block; blocks of one id share their module.
        share_input_output_emb: the head's weight is the embedding.
        sparse_attn, optimize_for_inference: accepted for old code, without effect.
    Raises: ValueError, TypeError (sizes out of range, unknown attention type, an object that is no VAE).
    """

    vae: Any
    num_image_tokens: int

    def __init__(
        self,
        *,
        dim: int,
        vae: Any,
        num_text_tokens: int = 10000,
        text_seq_len: int = 256,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        reversible: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        sparse_attn: bool = False,
        attn_types: str | Sequence[str] | None = None,
        loss_img_weight: float = 7,
        stable: bool = False,
        sandwich_norm: bool = False,
        shift_tokens: bool = True,
        rotary_emb: bool = True,
        rotary_dtype: str = "float32",
        shared_attn_ids: Sequence[object] | None = None,
        shared_ff_ids: Sequence[object] | None = None,
        share_input_output_emb: bool = False,
        optimize_for_inference: bool = False,
    ) -> None:
        super().__init__()
        check_vae(vae)
        for name, value in (("num_text_tokens", num_text_tokens), ("text_seq_len", text_seq_len)):
            if value < 1:
                raise ValueError(f"DALLE: {name} must be at least 1, got {value}.")
        side = vae.image_size // 2**vae.num_layers
        self.layout = TokenLayout(text_seq_len + 1, (side, side))
        self.num_text_tokens = num_text_tokens + text_seq_len  # every text position has a padding id of its own
        self.num_image_tokens = vae.num_tokens
        self.text_seq_len = text_seq_len
        self.image_seq_len = self.layout.n_image
        self.total_tokens = self.num_text_tokens + self.num_image_tokens
        self.total_seq_len = self.layout.max_inputs
        self.loss_img_weight = loss_img_weight
        self.stable = stable
        self.share_input_output_emb = share_input_output_emb

        self.vae = vae
        if isinstance(vae, nn.Module):
            vae.requires_grad_(False)
        self.transformer = Transformer(
            dim=dim, depth=depth, seq_len=self.total_seq_len, reversible=reversible, causal=True, heads=heads,
            dim_head=dim_head, attn_dropout=attn_dropout, ff_dropout=ff_dropout, attn_types=attn_types,
            image_fmap_size=side, stable=stable, sandwich_norm=sandwich_norm, shift_tokens=shift_tokens,
            rotary_emb=rotary_emb, rotary_dtype=rotary_dtype,
            shared_attn_ids=shared_attn_ids, shared_ff_ids=shared_ff_ids,
        )  # fmt: skip
        self.divide_max = DivideMax(dim=-1) if stable else nn.Identity()
        self.logits_norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, self.total_tokens)
        if not share_input_output_emb:
            self.text_emb = nn.Embedding(self.num_text_tokens, dim)
            self.image_emb = nn.Embedding(self.num_image_tokens, dim)
        self.rotary_emb = rotary_emb
        if not rotary_emb:
            self.text_pos_emb = nn.Embedding(self.layout.text_len, dim)
            self.image_row_emb = nn.Parameter(torch.randn(self.layout.grid_rows, dim))
            self.image_col_emb = nn.Parameter(torch.randn(self.layout.grid_cols, dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DALLE:
        with without_vae(self) as vae:
            super()._apply(fn, recurse)
        if vae is not None and recurse:
            vae._apply(not_narrowed(fn))
        return self

    # -------------------------------------------------------------------------------------------- training and scoring

    def forward(
        self,
        text: Tensor,
        image: Tensor | None = None,
        return_loss: bool = False,
        null_cond_prob: float = 0.0,
        cache: dict[str, Any] | None = None,
        labels: Tensor | None = None,
        return_loss_parts: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits of every next token, or the loss.

        Args:
            text: int [B, text_seq_len] ids, 0 = padding; never written to.
            image: int [B, n] codes, n <= image_seq_len, or pixels [B, channels, image_size, image_size]; None for text
                alone. A complete image drops its last code, which predicts nothing.
            return_loss: return (text loss + loss_img_weight * image loss) / (1 + loss_img_weight), each a mean in nats
                a token.
            null_cond_prob: probability with which a sample's text is replaced by padding.
            cache: {} on the first call, the same dict on later ones, whose `image` is longer; only the tokens the
                cache has not seen are read, and only their logits returned.
            labels: int [B, n], the codes a loss compares with, where they are not those of `image` (noise in what is
                read, a relabelled image).
            return_loss_parts: with return_loss, also return its two means, from the same pass.
        Returns: [B, N, total_tokens], -finfo.max where a position cannot predict a token; or the scalar loss; or
            (loss, text loss, image loss), scalars, the last two detached.
        Raises: ValueError, TypeError (shapes, ranges, dtypes, a cache that belongs to another call).
        """
        if return_loss_parts and not return_loss:
            raise ValueError(
                "DALLE: return_loss_parts must come with return_loss=True, got False. Logits have no parts."
            )
        text = self._checked_text(text)
        if null_cond_prob > 0:
            dropped = torch.rand(text.shape[0], device=text.device) < null_cond_prob
            text = text.masked_fill(dropped[:, None], 0)
        text = self._padded(text)
        codes = self._codes(image, text)
        if return_loss:
            if cache is not None:
                raise ValueError("DALLE: return_loss and cache cannot be combined. A loss needs every position.")
            wanted = codes if labels is None else checked_labels(labels, codes, self.num_image_tokens)
            text_loss, image_loss = self._losses(text, codes, wanted)
            loss = (text_loss + self.loss_img_weight * image_loss) / (self.loss_img_weight + 1)
            return (loss, text_loss.detach(), image_loss.detach()) if return_loss_parts else loss
        if labels is not None:
            raise ValueError("DALLE: labels are what a loss compares with, got them without return_loss=True.")
        if cache is not None:
            return self._cached_logits(text, codes, cache)
        return self._logits(self.transformer(self._embed(text, codes)), first=0)

    def forward_with_cond_scale(
        self, *args: Any, cond_scale: float = 1, cache: dict[str, Any] | None = None, **kwargs: Any
    ) -> Tensor:
        """Logits guided away from those without text: null + (logits - null) * cond_scale; arguments as `forward`.

        The two branches keep caches of their own in `cache`.
        """
        logits = self(*args, cache=cache, **kwargs)
        if cond_scale == 1:
            return logits
        null_cache = None if cache is None else cache.setdefault("null", {})
        null = self(*args, null_cond_prob=1.0, cache=null_cache, **kwargs)
        return null + (logits - null) * cond_scale

    # -------------------------------------------------------------------------------------------- sampling

    def generate_images(
        self,
        text: Tensor,
        *,
        clip: nn.Module | None = None,
        filter_thres: float = 0.5,
        temperature: float = 1.0,
        img: Tensor | None = None,
        num_init_img_tokens: int | None = None,
        cond_scale: float = 1.0,
        use_cache: bool = True,
        seed: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        known_tokens: Tensor | None = None,
        return_tokens: bool = False,
        on_tokens: Callable[[int, Tensor], None] | None = None,
        engine: str = "auto",
        weight_dtype: torch.dtype | None = None,
        max_memory: int | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Draws one image a text. The model's training flags are as before afterwards, also after an error.

        Args:
            text: int [B, >= text_seq_len] ids, cut to text_seq_len.
            clip: scores the images against the texts.
            filter_thres: keep the (1 - filter_thres) most likely of the whole vocabulary, text included, as the
                original.
            temperature: divides the logits; 0 takes the most likely code.
            img: [B, channels, image_size, image_size] whose first `num_init_img_tokens` codes (default 7/16) are kept.
            cond_scale: guidance; 1 is none.
            use_cache: False recomputes the whole sequence for every token.
            seed: None draws from torch's generator (or `generator`); an int gives image i the seed + i; or one an
                image.
            top_k: keep this many image codes (replaces filter_thres).
            top_p: keep the fewest codes of this probability.
            known_tokens: int [B, n], -1 where the code is to be drawn; a missing tail is drawn. Not with `img`.
            return_tokens: also return the codes.
            on_tokens: called once a grid row with (index of the first code, codes [B, m]); what it raises stops the
                drawing. A batch drawn in micro-batches calls it for each, with -1 for the other samples.
            engine: "cpu" (in C++: the same bits for a text and a seed in any batch), "eager" (the modules themselves,
                on any device), or "auto": cpu where it can. `dalle_fast.explain("decode", model=self)` says why not.
            weight_dtype: what `cpu` holds weights as: torch.float32, torch.bfloat16 or torch.int8; None: bfloat16 for
                a model in bfloat16, float32 for others.
            max_memory: bytes `cpu` may take, packed weights included; None: four fifths of what is available now.
                `dalle_fast.sampling.plan.plan_drawing` says beforehand what comes of it.
        Returns: images [B, channels, image_size, image_size]; then scores [B] with `clip`; then codes
            [B, image_seq_len] with `return_tokens`: a tuple if more than one.
        Raises: ValueError, TypeError; NotImplementedError, RuntimeError (the engine asked for cannot run); MemoryError.
        Source: DALLE-pytorch; filters and noise are described in docs/sampling.md.
        """
        from dalle_fast.sampling.images import generate_images  # at call time: sampling stands above models

        return generate_images(
            self, text, clip=clip, filter_thres=filter_thres, temperature=temperature, img=img,
            num_init_img_tokens=num_init_img_tokens, cond_scale=cond_scale, use_cache=use_cache, seed=seed,
            generator=generator, top_k=top_k, top_p=top_p, known_tokens=known_tokens, return_tokens=return_tokens,
            on_tokens=on_tokens, engine=engine, weight_dtype=weight_dtype, max_memory=max_memory,
        )  # fmt: skip

    def generate_texts(
        self,
        tokenizer: Any,
        text: str | None = None,
        *,
        filter_thres: float = 0.5,
        temperature: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        engine: str = "auto",
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Continues a text as the model was trained to, on the model's device.

        Args:
            tokenizer: an object with encode(str) and decode(ids, pad_tokens=set), or one whose `.tokenizer` has them.
            text: the beginning; None or "" starts from nothing.
            Others as `generate_images`.
        Returns: ids [1, text_seq_len], and the text in a list.
        """
        from dalle_fast.sampling.texts import generate_texts  # at call time: sampling stands above models

        return generate_texts(
            self,
            tokenizer,
            text,
            filter_thres=filter_thres,
            temperature=temperature,
            seed=seed,
            generator=generator,
            top_k=top_k,
            top_p=top_p,
            engine=engine,
            weight_dtype=weight_dtype,
        )

    # -------------------------------------------------------------------------------------------- embeddings and head

    def embed_text(self, text: Tensor) -> Tensor:
        """Embeddings [B, n, C] of text ids [B, n], which stand at 0..n-1: `<bos>` first, padding already unique."""
        weight = self.to_logits.weight[: self.num_text_tokens] if self.share_input_output_emb else None
        tokens = self.text_emb(text) if weight is None else F.embedding(text, weight)
        if not self.rotary_emb:
            tokens = tokens + self.text_pos_emb.weight[: text.shape[1]]
        return self._relaxed(tokens)

    def embed_image(self, codes: Tensor, first: int = 0) -> Tensor:
        """Embeddings [B, n, C] of image codes [B, n], image tokens first .. first + n - 1."""
        weight = self.to_logits.weight[self.num_text_tokens :] if self.share_input_output_emb else None
        tokens = self.image_emb(codes) if weight is None else F.embedding(codes, weight)
        if not self.rotary_emb:
            place = torch.arange(first, first + codes.shape[1], device=codes.device)
            cols = self.layout.grid_cols
            tokens = tokens + (self.image_row_emb[place // cols] + self.image_col_emb[place % cols])
        return self._relaxed(tokens)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, n, num_image_tokens] of the image codes alone, from the transformer's output [B, n, C]."""
        normed = self.logits_norm(self.divide_max(hidden))
        head = self.to_logits
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            return head(normed)[..., self.num_text_tokens :]  # replaced or hooked: what it does may need all of it
        return F.linear(normed, head.weight[self.num_text_tokens :], head.bias[self.num_text_tokens :])

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, n, num_text_tokens] of the text ids alone, unique padding ids included."""
        normed = self.logits_norm(self.divide_max(hidden))
        return self.to_logits(normed)[..., : self.num_text_tokens]

    def padded_text(self, text: Tensor) -> Tensor:
        """`<bos>` and the ids [B, text_seq_len], padding made unique: int64 [B, T]. Checks ids and shape first."""
        return self._padded(self._checked_text(text))

    def _padded(self, text: Tensor) -> Tensor:
        unique = torch.arange(self.num_text_tokens - self.text_seq_len, self.num_text_tokens, device=text.device)
        return F.pad(torch.where(text == 0, unique, text), (1, 0))

    def _embed(self, text: Tensor, codes: Tensor) -> Tensor:
        tokens = self.embed_text(text)
        if codes.shape[1]:
            tokens = torch.cat((tokens, self.embed_image(codes)), dim=1)
        return tokens[:, : self.total_seq_len]

    def _relaxed(self, tokens: Tensor) -> Tensor:
        return tokens * _RELAXED + tokens.detach() * (1 - _RELAXED) if self.stable else tokens

    def _logits(self, hidden: Tensor, first: int) -> Tensor:
        logits = self.to_logits(self.logits_norm(self.divide_max(hidden)))
        n_text = max(self.layout.text_len - 1 - first, 0)  # rows that predict text
        lowest = -torch.finfo(logits.dtype).max
        predicts_text = torch.arange(logits.shape[1], device=logits.device) < n_text
        is_text = torch.arange(self.total_tokens, device=logits.device) < self.num_text_tokens
        return logits.masked_fill_(predicts_text[:, None] != is_text, lowest)

    def _cached_logits(self, text: Tensor, codes: Tensor, cache: dict[str, Any]) -> Tensor:
        tokens = self._embed(text, codes)
        state, offset = cache.get("state"), cache.get("offset", 0)
        if state is None:
            state = DecodeCache(self.layout, max_step=self.layout.length)
        if state.offset != offset:
            raise ValueError(
                f"DALLE: cache must not be stepped through a copy, got one at {offset} whose state is at "
                f"{state.offset}."
            )
        if tokens.shape[1] <= offset:
            raise ValueError(
                f"DALLE: cache has read {offset} tokens, so text and image must have more, got {tokens.shape[1]}."
            )
        logits = self._logits(self.transformer(tokens[:, offset:], cache=state), first=offset)
        cache.update(state=state, offset=state.offset)
        return logits

    def _losses(self, text: Tensor, codes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Means over text and over image tokens."""
        if codes.shape[0] == 0 or codes.shape[1] == 0:
            raise ValueError(
                f"DALLE: return_loss needs at least one text and one image code, got image codes {list(codes.shape)}."
            )
        labels = torch.cat((text[:, 1:], wanted), dim=1)
        hidden = self.transformer(self._embed(text, codes)[:, : labels.shape[1]])
        return vocab_cross_entropy(
            hidden, (self.logits_norm.weight, self.logits_norm.bias), self.to_logits.weight, self.to_logits.bias,
            labels, self.layout, self.num_text_tokens, divide_max=self.stable,
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------- checks

    def _checked_text(self, text: Tensor) -> Tensor:
        return checked_text(text, self.text_seq_len, self.num_text_tokens)

    def _codes(self, image: Tensor | None, text: Tensor) -> Tensor:
        """Codes [B, n] of codes or pixels, checked; none of no image."""
        if image is None:
            return text[:, :0]
        pixels = [self.vae.channels, self.vae.image_size, self.vae.image_size]
        check_image_shape(image, text.shape[0], self.image_seq_len, pixels)
        if image.dim() == 4:
            with torch.autocast(image.device.type, enabled=False):  # codes of 16 bits would be others
                return self.vae.get_codebook_indices(pixels_for(self.vae, image))
        return checked_ids(image, self.num_image_tokens, "image codes")
