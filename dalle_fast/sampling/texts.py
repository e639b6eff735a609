"""Continuing a text with the model's text half. The public face is `DALLE.generate_texts`.

The original leaves `<bos>` and the token shift out here, unlike its training; this follows the training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast import rng
from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling.engine import choose_engine, make_engine
from dalle_fast.sampling.filters import Filters
from dalle_fast.sampling.images import evaluating


@torch.no_grad()
def generate_texts(
    model: DALLE,
    tokenizer: Any,
    text: str | None,
    *,
    filter_thres: float,
    temperature: float,
    seed: int | None,
    generator: torch.Generator | None,
    top_k: int | None,
    top_p: float | None,
    engine: str,
    weight_dtype: torch.dtype | None,
) -> tuple[Tensor, list[str]]:
    """See `DALLE.generate_texts`."""
    tokenizer = _with_codec(tokenizer)
    filters = Filters.from_threshold(
        filter_thres, model.total_tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )
    name = choose_engine(model, engine, weight_dtype=weight_dtype, op="generate_texts")
    beginning = [int(i) for i in tokenizer.encode(text)] if text else []
    length, device = model.text_seq_len, model.to_logits.weight.device
    if len(beginning) >= length:
        raise ValueError(
            f"generate_texts: text must be shorter than {length} tokens, got {len(beginning)}. "
            "There is nothing left to write."
        )
    ids = torch.tensor([beginning + [0] * (length - len(beginning))], device=device)
    prompt = model.padded_text(ids)[:, : 1 + len(beginning)]  # <bos> and the beginning
    seeds = rng.resolve_seeds(seed, 1, generator)
    with evaluating(model):
        writing = make_engine(name, model, weight_dtype=weight_dtype)
        logits = writing.prefill(prompt)
        for i in range(len(beginning), length):
            token = filters.token(logits, seeds, i, rng.Stream.TEXT_SAMPLING)
            ids[:, i] = token
            if i + 1 < length:
                logits = writing.step(token[:, None])[:, 0]
    padding = set(range(model.num_text_tokens - length, model.num_text_tokens))
    return ids, [tokenizer.decode(row, pad_tokens=padding) for row in ids]


def _with_codec(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one a module such as `dalle_fast.tokenizer` carries as `.tokenizer`."""
    for candidate in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if hasattr(candidate, "encode") and hasattr(candidate, "decode"):
            return candidate
    raise TypeError(
        "generate_texts: tokenizer must have encode and decode, or a .tokenizer that has, "
        f"got {type(tokenizer).__name__}."
    )
