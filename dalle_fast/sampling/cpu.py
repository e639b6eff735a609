"""The engine in C++ (csrc/cpu/decode*): the same bits for a prompt and a seed, whatever is drawn beside them.

A text's keys and values are kept once for all samples of a prompt; a sample owns its image's alone. Guidance reads one
prompt more, the empty one, and a second sequence a sample behind it.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from dalle_fast import rng
from dalle_fast.models.cache import DecodeCache
from dalle_fast.models.checks import checked_ids
from dalle_fast.models.dalle import DALLE
from dalle_fast.native.choose_token import TokenChoice
from dalle_fast.native.decode import DecodeDraw
from dalle_fast.sampling.cpu_caches import ROWS_AT_ONCE, Samples, Texts, Workspace, prompt_names
from dalle_fast.sampling.eager import check_draw, check_text_step, guided, with_null_text
from dalle_fast.sampling.filters import Filters
from dalle_fast.sampling.packed import PackedDALLE, packed, weight_dtype_of


class CpuEngine:
    """Decodes in C++ from packed weights: those the model has at `prefill`.

    Args:
        model: one that `dalle_fast.explain("decode", model=model)` lets this engine run.
        cond_scale: guidance; other than 1 runs a second, text-free sequence a sample.
        max_step, max_rollback: see `DecodeCache`.
        weight_dtype: what weights are held as, float32, bfloat16 or int8; None: bfloat16 for a model in bfloat16,
            float32 for others. Keys and values are bfloat16 where weights are not float32; sums are float32.
    """

    _order: Tensor  # int64 [B]: the engine's samples, those of one prompt together, as places in the caller's batch
    _prompt_of: Tensor  # int64 [sequences]: of the engine's samples, then of their text-free twins

    def __init__(
        self,
        model: DALLE,
        *,
        cond_scale: float = 1.0,
        max_step: int = 1,
        max_rollback: int = 0,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.cond_scale = cond_scale
        self._weight_dtype = weight_dtype_of(model, weight_dtype)
        self._layout = model.layout
        self._place = DecodeCache(model.layout, max_step=max_step, max_rollback=max_rollback)  # counts, holds nothing
        self._workspace = Workspace()
        self._texts: Texts | None = None
        self._samples: Samples | None = None
        self._next: Tensor | None = None  # [sequences, K]: logits behind the prefix, in the engine's order

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(part.nbytes for part in (self._texts, self._samples) if part is not None)

    def prefill(self, text: Tensor, codes: Tensor | None = None) -> Tensor:
        """As `EagerEngine.prefill`; float32. Prompts are read once each, and kept for the next prefill."""
        n_text, n_codes = text.shape[1], 0 if codes is None else codes.shape[1]
        place = DecodeCache(self._layout, max_step=self._place.max_step, max_rollback=self._place.max_rollback)
        place.check_step(n_text + n_codes, self._layout.length)
        if n_codes and n_text < self._layout.text_len:
            raise ValueError(f"prefill: codes must follow a text of {self._layout.text_len} tokens, got {n_text}.")
        if text.shape[0] == 0:
            raise ValueError("prefill: text must hold at least one prompt, got none.")
        if codes is not None and len(codes) != len(text):
            raise ValueError(f"prefill: codes must be [B={len(text)}, m], one row a text, got {list(codes.shape)}.")
        text = checked_ids(text, self.model.num_text_tokens, "text ids")
        codes = None if codes is None else checked_ids(codes, self.model.num_image_tokens, "image codes")
        model = packed(self.model, self._weight_dtype)
        self._place = place
        self._read_texts(model, text)
        place.advance(n_text)
        longest = max(place.max_step, self._layout.grid_cols if n_codes else 1)
        self._make_samples(model, longest - 1 + place.max_rollback)
        assert self._texts is not None
        self._next = self._texts.logits[self._prompt_of]
        if codes is not None and n_codes:
            self._read_codes(self._by_sequence(codes))
        return self._answer(self._next)

    def step(self, tokens: Tensor) -> Tensor:
        """As `EagerEngine.step`; float32."""
        self._check_batch("step", "tokens", tokens)
        n, start = tokens.shape[1], self._place.offset - self._layout.text_len
        self._place.check_step(n, self._layout.length)
        assert self._texts is not None and self._samples is not None
        if start >= 0:
            tokens = checked_ids(tokens, self.model.num_image_tokens, "image codes")
            logits = self._samples.read(self._by_sequence(tokens), start, last_only=False)
        else:
            check_text_step(self._place.offset, n, self._layout.text_len)
            tokens = checked_ids(tokens, self.model.num_text_tokens, "text ids")
            logits = self._texts.read(0, self._by_sequence(tokens), self._place.offset, last_only=False)
        self._place.advance(n)
        logits = logits.unflatten(0, (-1, n))
        self._next = logits[:, -1].contiguous()
        return self._answer(logits)

    def rollback(self, n: int) -> None:
        """Takes the last n tokens back; of a text that was complete at `prefill`, which samples share, none."""
        most = self._place.offset - self._layout.text_len
        if 0 <= most < n and self._texts is not None and self._texts.shared:
            raise ValueError(
                f"rollback: n must be in 0..{most}, got {n}. Samples of a prompt share its text: prefill another."
            )
        self._place.rollback(n)
        self._next = self._next if n == 0 else None

    def draw(self, codes: Tensor, first: int, count: int, filters: Filters, seeds: Tensor) -> None:
        """As `EagerEngine.draw`, in one call."""
        self._check_batch("draw", "codes", codes)
        n_image, n_codes = self._layout.n_image, self.model.num_image_tokens
        n_read = self._place.offset - self._layout.text_len
        check_draw(codes, first, count, seeds, n_image, n_read, self._next is not None)
        if count == 0:
            return
        ordered, ordered_seeds = codes[self._order].contiguous(), seeds[self._order].contiguous()
        if (ordered[:, first : first + count] >= n_codes).any():
            raise ValueError(f"draw: codes must be -1 or in 0..{n_codes - 1}, got larger ones.")
        draw = DecodeDraw(
            *(ordered.shape[0], count, first, self.cond_scale != 1, self.cond_scale),
            TokenChoice.of(n_codes, rng.Stream.IMAGE_SAMPLING, **asdict(filters)),
            *(ordered_seeds.data_ptr(), ordered.data_ptr()),
        )
        assert self._samples is not None and self._next is not None
        self._samples.draw(draw, self._next)
        codes[self._order, first : first + count] = ordered[:, first : first + count]
        ended = first + count == n_image  # the last image token is not read
        self._place.advance(count - ended)
        if ended:
            self._next = None

    def _check_batch(self, call: str, name: str, tokens: Tensor) -> None:
        """Raises ValueError before the first prefill, and where `tokens` are not those of its samples."""
        if self._texts is None:
            raise ValueError(f"{call}: nothing has been read. Call prefill before.")
        if tokens.dim() != 2 or len(tokens) != len(self._order):
            raise ValueError(
                f"{call}: {name} must be [B={len(self._order)}, M], the samples of prefill, got {list(tokens.shape)}."
            )

    # -------------------------------------------------------------------------------------------- parts of a prefill

    def _read_texts(self, model: PackedDALLE, text: Tensor) -> None:
        """Reads the prompts that nobody has read yet; decides the engine's order of samples."""
        batch = len(text)
        text, _ = with_null_text(self.model, text, None, self.cond_scale)
        if text.shape[1] < self._layout.text_len:  # each will go on its own way
            model.pack_text_head(self.model)
            self._texts = Texts(model, text, {}, self._place.slack, self._workspace)
            self._order, self._prompt_of = torch.arange(batch), torch.arange(len(text))
            return
        distinct, which = text.unique(dim=0, return_inverse=True)
        names = prompt_names(distinct)
        kept = self._texts if self._texts is not None and self._texts.shared and self._texts.model is model else None
        if kept is None or any(name not in kept.index for name in names):
            known = {name: prompt for name, prompt in model.prompts.items() if name in names}
            known |= {} if kept is None else {name: kept.prompt(name) for name in names if name in kept.index}
            kept = self._texts = None  # before their successors take their memory
            kept = self._texts = Texts(model, distinct, known, self._place.slack, self._workspace)
        self._order = which[:batch].argsort(stable=True)
        self._prompt_of = torch.tensor([kept.index[name] for name in names])[which]
        self._prompt_of = torch.cat((self._prompt_of[self._order], self._prompt_of[batch:]))
        if self.cond_scale != 1:
            null = names[int(which[-1])]
            model.prompts.setdefault(null, kept.prompt(null))

    def _make_samples(self, model: PackedDALLE, slack: int) -> None:
        n, samples = len(self._prompt_of), self._samples
        if samples is None or samples.model is not model or samples.slack != slack or samples.room < n:
            samples = self._samples = None  # before their successors take their memory
            samples = self._samples = Samples(model, slack, n, self._workspace)
        assert self._texts is not None
        samples.begin(self._texts, self._prompt_of)

    def _read_codes(self, codes: Tensor) -> None:
        """Reads the codes [sequences, n] behind the text, at most a grid row of each sequence a call."""
        assert self._samples is not None
        at_once = min(self._layout.grid_cols, max(1, ROWS_AT_ONCE // len(codes)))
        for start in range(0, codes.shape[1], at_once):
            self._next = self._samples.read(codes[:, start : start + at_once], start, last_only=True)
        self._place.advance(codes.shape[1])

    def _by_sequence(self, tokens: Tensor) -> Tensor:
        """The caller's [B, M] as [sequences, M] in the engine's order."""
        tokens = tokens[self._order]
        return tokens if self.cond_scale == 1 else torch.cat((tokens, tokens))

    def _answer(self, logits: Tensor) -> Tensor:
        """The engine's logits [sequences, ...] as the caller's [B, ...], guided."""
        return guided(logits, self.cond_scale)[self._order.argsort()]
