"""The engines in plain torch: they run the model's own modules, so hooks, adapters and replaced layers take part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dalle_fast import rng
from dalle_fast.models.cache import DecodeCache
from dalle_fast.models.dalle import DALLE
from dalle_fast.ops.gumbel_noise import gumbel_noise
from dalle_fast.sampling.filters import Filters

_NOISE_VALUES = 1 << 24  # noise made at once, values: bounds its memory at 64 MiB


class _TokenLoop:
    """Draws token by token through `step`; `_next` are the logits [B, K] behind the prefix, None where unknown."""

    model: DALLE
    _next: Tensor | None = None

    def step(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def _n_codes(self) -> int:
        """Image codes read."""
        raise NotImplementedError

    def draw(self, codes: Tensor, first: int, count: int, filters: Filters, seeds: Tensor) -> None:
        """Fills codes [B, R * C] at first .. first + count - 1 in place, from behind the first `first` codes.

        Args:
            codes: int64; those that are not -1 are kept, and read in their turn.
            seeds: int64 [B], 64 bits each.
        The engine is then behind all of them but the last of the image, which nobody reads.
        """
        n_image = self.model.image_seq_len
        check_draw(codes, first, count, n_image, self._n_codes, self._next is not None)
        any_known = (codes[:, first : first + count] >= 0).any(dim=0).tolist()
        noises = _noise(filters, seeds, range(first, first + count), self.model.num_image_tokens)
        for p in range(first, first + count):
            assert self._next is not None
            drawn = filters.choose(self._next, next(noises))
            codes[:, p] = torch.where(codes[:, p] >= 0, codes[:, p], drawn) if any_known[p - first] else drawn
            self._next = None
            if p + 1 < n_image:
                self.step(codes[:, p : p + 1])


class EagerEngine(_TokenLoop):
    """Decodes with caches typed by pattern: a step reads the new tokens only.

    Args:
        model: its parameters are read at every step.
        cond_scale: guidance; other than 1 runs a second, text-free sequence a sample, in the same batch.
        max_step, max_rollback: see `DecodeCache`.
    """

    def __init__(self, model: DALLE, *, cond_scale: float = 1.0, max_step: int = 1, max_rollback: int = 0) -> None:
        self.model = model
        self.cond_scale = cond_scale
        self._cache = DecodeCache(model.layout, max_step=max_step, max_rollback=max_rollback)

    @property
    def _n_codes(self) -> int:
        return self._cache.offset - self.model.layout.text_len

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
        self._next = self._logits(hidden[:, -1:])[:, 0]
        return self._next

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
        self._next = logits[:, -1]
        return logits

    def rollback(self, n: int) -> None:
        """Takes the last n tokens back."""
        self._cache.rollback(n)
        self._next = self._next if n == 0 else None

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


class UncachedEngine(_TokenLoop):
    """The same interface, recomputing the whole sequence for every token: the proof of the cached one."""

    def __init__(self, model: DALLE, *, cond_scale: float = 1.0) -> None:
        self.model = model
        self.cond_scale = cond_scale

    @property
    def _n_codes(self) -> int:
        return self._codes.shape[1]

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
        self._next = self._next if n == 0 else None

    def _last_logits(self, n: int) -> Tensor:
        text, codes = with_null_text(self.model, self._text, self._codes, self.cond_scale)
        hidden = self.model.transformer(embedded(self.model, text, codes))
        logits = guided(self.model.image_logits(hidden[:, -n:]), self.cond_scale)
        self._next = logits[:, -1]
        return logits


def check_text_step(start: int, n: int, text_len: int) -> None:
    """Raises ValueError where n text tokens at `start` and later cross into the image."""
    if n > 1 and start + n >= text_len:
        raise ValueError(
            f"step: {n} tokens from position {start} cross from text to image. Read the last text token alone."
        )


def check_draw(codes: Tensor, first: int, count: int, n_image: int, n_read: int, has_logits: bool) -> None:
    """Raises ValueError where an engine behind n_read codes cannot draw these."""
    if codes.dim() != 2 or codes.shape[1] != n_image:
        raise ValueError(f"draw: codes must be [B, {n_image}], got {list(codes.shape)}.")
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


def _noise(filters: Filters, seeds: Tensor, positions: range, n_codes: int) -> Iterator[Tensor | None]:
    """Gumbel noise [B, K] of each image token: a function of seed and token alone."""
    if not filters.needs_noise:
        yield from (None for _ in positions)
        return
    batch = len(seeds)
    together = max(1, _NOISE_VALUES // (batch * n_codes))
    for position in torch.tensor(positions, device=seeds.device).split(together):
        grid = gumbel_noise(
            seeds.repeat(len(position)), position.repeat_interleave(batch), rng.Stream.IMAGE_SAMPLING, n_codes
        )
        yield from grid.view(len(position), batch, n_codes)
