"""The engines in plain torch: they run the model's own modules, so hooks, adapters and replaced layers take part."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast import rng
from dalle_fast.models.cache import DecodeCache
from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling.filters import Filters


class EagerEngine:
    """Decodes with caches typed by pattern: a step reads the new tokens only.

    Args:
        model: its parameters are read at every step.
        cond_scale: guidance; other than 1 runs a second, text-free sequence a sample, in the same batch.
        max_step, max_rollback: see `DecodeCache`.
    """

    def __init__(self, model: DALLE, *, cond_scale: float = 1.0, max_step: int = 1, max_rollback: int = 0) -> None:
        self.model = model
        self.cond_scale = cond_scale
        self.behind: Tensor | None = None  # logits [B, V] behind the prefix, where they are known
        self._cache = DecodeCache(model.layout, max_step=max_step, max_rollback=max_rollback)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self._cache.nbytes

    def prefill(self, text: Tensor, codes: Tensor | None = None) -> Tensor:
        """Starts with `<bos>` and text ids [B, n] (padding already unique; n = T where codes follow) and codes [B, m].

        Returns: logits [B, V] of the next token: image codes behind a complete text, else text ids.
        """
        self._cache = DecodeCache(
            self.model.layout, max_step=self._cache.max_step, max_rollback=self._cache.max_rollback
        )
        text, codes = with_null_text(self.model, text, codes, self.cond_scale)
        hidden = self.model.transformer(embedded(self.model, text, codes), cache=self._cache)
        self.behind = self._logits(hidden[:, -1:])[:, 0]
        return self.behind

    def step(self, tokens: Tensor) -> Tensor:
        """Reads tokens [B, M] behind the prefix: text ids while the text is not complete, then image codes.

        Returns: logits [B, M, V] of the token after each; a step must not cross from text to image.
        """
        if self.cond_scale != 1:
            tokens = torch.cat((tokens, tokens))
        start = self._cache.offset - self.model.layout.text_len
        if start < 0:
            hidden = self.model.transformer(self._embedded_text(tokens), cache=self._cache)
        else:
            hidden = self.model.transformer(self.model.embed_image(tokens, start), cache=self._cache)
        logits = self._logits(hidden)
        self.behind = logits[:, -1]
        return logits

    def rollback(self, n: int) -> None:
        """Takes the last n tokens back."""
        self._cache.rollback(n)
        self.behind = self.behind if n == 0 else None

    def draw(self, codes: Tensor, first: int, count: int, filters: Filters, seeds: Tensor) -> None:
        """Fills codes [B, R * C] in place, see `dalle_fast.sampling.engine.Engine`."""
        _draw(self, self._cache.offset - self.model.layout.text_len, codes, first, count, filters, seeds)

    def _embedded_text(self, tokens: Tensor) -> Tensor:
        start = self._cache.offset
        check_text_step(start, tokens.shape[1], self.model.layout.text_len)
        before = tokens.new_zeros(tokens.shape[0], start)
        return self.model.embed_text(torch.cat((before, tokens), dim=1))[:, start:]

    def _logits(self, hidden: Tensor) -> Tensor:
        # every position of a step stands on one side of the text's end, which the last of them shows
        in_text = self._cache.offset < self.model.layout.text_len
        logits = self.model.text_logits(hidden) if in_text else self.model.image_logits(hidden)
        return guided(logits, self.cond_scale)


class UncachedEngine:
    """The same interface, recomputing the whole sequence for every token: the proof of the cached one."""

    def __init__(self, model: DALLE, *, cond_scale: float = 1.0) -> None:
        self.model = model
        self.cond_scale = cond_scale
        self.behind: Tensor | None = None

    def prefill(self, text: Tensor, codes: Tensor | None = None) -> Tensor:
        self._text = text
        self._codes = text[:, :0] if codes is None else codes
        return self._last_logits(1)[:, 0]

    def step(self, tokens: Tensor) -> Tensor:
        self._codes = torch.cat((self._codes, tokens), dim=1)
        return self._last_logits(tokens.shape[1])

    def rollback(self, n: int) -> None:
        if not 0 <= n <= self._codes.shape[1]:
            raise ValueError(f"rollback: n must be in 0..{self._codes.shape[1]}, got {n}.")
        self._codes = self._codes[:, : self._codes.shape[1] - n]
        self.behind = self.behind if n == 0 else None

    def draw(self, codes: Tensor, first: int, count: int, filters: Filters, seeds: Tensor) -> None:
        _draw(self, self._codes.shape[1], codes, first, count, filters, seeds)

    def _last_logits(self, n: int) -> Tensor:
        text, codes = with_null_text(self.model, self._text, self._codes, self.cond_scale)
        hidden = self.model.transformer(embedded(self.model, text, codes))
        logits = guided(self.model.image_logits(hidden[:, -n:]), self.cond_scale)
        self.behind = logits[:, -1]
        return logits


def _draw(
    engine: EagerEngine | UncachedEngine,
    n_read: int,
    codes: Tensor,
    first: int,
    count: int,
    filters: Filters,
    seeds: Tensor,
) -> None:
    """Token by token, through the engine's steps."""
    n_image = engine.model.image_seq_len
    check_draw(codes, first, count, seeds, n_image, n_read, engine.behind is not None)
    any_known = (codes[:, first : first + count] >= 0).any(dim=0).tolist()
    for p in range(first, first + count):
        assert engine.behind is not None
        drawn = filters.token(engine.behind, seeds, p, rng.Stream.IMAGE_SAMPLING)
        codes[:, p] = torch.where(codes[:, p] >= 0, codes[:, p], drawn) if any_known[p - first] else drawn
        engine.behind = None
        if p + 1 < n_image:
            engine.step(codes[:, p : p + 1])


def check_text_step(start: int, n: int, text_len: int) -> None:
    """Raises ValueError where n text tokens at `start` and later cross into the image."""
    if n > 1 and start + n >= text_len:
        raise ValueError(
            f"step: {n} tokens from position {start} cross from text to image. Read the last text token alone."
        )


def check_draw(
    codes: Tensor, first: int, count: int, seeds: Tensor, n_image: int, n_read: int, has_logits: bool
) -> None:
    """Raises ValueError where an engine behind n_read codes cannot draw these."""
    if codes.dtype != torch.int64 or codes.dim() != 2 or codes.shape[1] != n_image:
        raise ValueError(f"draw: codes must be [B, {n_image}] of int64, got {list(codes.shape)} of {codes.dtype}.")
    if seeds.dtype != torch.int64 or list(seeds.shape) != [len(codes)]:
        raise ValueError(f"draw: seeds must be int64 [B={len(codes)}], got {list(seeds.shape)} of {seeds.dtype}.")
    if first != n_read or not has_logits:
        raise ValueError(
            f"draw: first must be the number of codes read, {n_read}, with their logits known, got {first}. "
            "Call prefill or step before."
        )
    if not 0 <= count <= n_image - first:
        raise ValueError(f"draw: count must be in 0..{n_image - first}, got {count}.")


def embedded(model: DALLE, text: Tensor, codes: Tensor | None) -> Tensor:
    """Embeddings [B, n + m, C] of a text and the codes behind it."""
    tokens = model.embed_text(text)
    if codes is None or codes.shape[1] == 0:
        return tokens
    return torch.cat((tokens, model.embed_image(codes)), dim=1)


def with_null_text(model: DALLE, text: Tensor, codes: Tensor | None, cond_scale: float) -> tuple[Tensor, Tensor | None]:
    """The batch, and behind it (with guidance) the same batch without its text."""
    if cond_scale == 1:
        return text, codes
    null = model.padded_text(torch.zeros(1, model.text_seq_len, dtype=torch.long, device=text.device))
    text = torch.cat((text, null[:, : text.shape[1]].expand_as(text)))
    return text, None if codes is None else torch.cat((codes, codes))


def guided(logits: Tensor, cond_scale: float) -> Tensor:
    """null + (conditional - null) * cond_scale, where the second half of the batch is the null one."""
    if cond_scale == 1:
        return logits
    conditional, null = logits.chunk(2)
    return null + (conditional - null) * cond_scale
