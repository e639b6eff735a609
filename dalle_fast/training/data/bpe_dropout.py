"""Byte-pair encoding with dropout, repeatable: the same text and generator give the same ids everywhere.

The library `tokenizers` has BPE dropout of its own, drawn from its thread's random numbers, which nothing can seed. So
the merges are read from the tokenizer and applied here: at every step each merge that is possible is left out with
probability `rate`, the best of the others is made, and a word is done when none is left. With rate 0 that is plain BPE.
Source: Provilkov et al., "BPE-Dropout", ACL 2020.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

from dalle_fast.tokenizers.clip_bpe import SPECIAL, SimpleTokenizer, clean
from dalle_fast.tokenizers.hug import HugTokenizer


class BpeDropout:
    """Encodes texts as a tokenizer does, with merges left out at random.

    Args:
        tokenizer: a SimpleTokenizer, or a HugTokenizer over a BPE.   rate: of the merges left out, in (0, 1].
    Raises: TypeError (another tokenizer).
    """

    def __init__(self, tokenizer: object, rate: float) -> None:
        model = _bpe_of(tokenizer)
        if model is None:
            raise TypeError(
                f"train: bpe_dropout needs a tokenizer with byte pairs to merge, got {type(tokenizer).__name__}. Set "
                "bpe_dropout to 0, or train a tokenizer: dalle-fast tokenizer train."
            )
        self.tokenizer: Any = tokenizer
        self.rate = rate
        self._ids: dict[str, int] = model["vocab"]
        self._unknown = self._ids.get(model.get("unk_token") or "")
        self._word_end = model.get("end_of_word_suffix") or ""
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        self._rank = {pair: rank for rank, pair in enumerate(merges)}

    def encode(self, text: str, seed: int) -> list[int]:
        """The ids of one text; `seed` decides which merges are left out."""
        draws = random.Random(seed)
        ids: list[int] = []
        for word in self._words(text):
            if word in SPECIAL and word in self._ids:
                ids.append(self._ids[word])
            else:
                ids.extend(self._merged(word, draws))
        return ids

    def _words(self, text: str) -> list[str]:
        inner = self.tokenizer.tokenizer
        if isinstance(self.tokenizer, SimpleTokenizer):
            text = clean(text)
        elif inner.normalizer is not None:
            text = inner.normalizer.normalize_str(text)
        return [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text)]

    def _merged(self, word: str, draws: random.Random) -> list[int]:
        parts = list(word)
        parts[-1] += self._word_end
        while len(parts) > 1:
            ranked = [
                (self._rank[pair], place)
                for place, pair in enumerate(pairwise(parts))
                if pair in self._rank and draws.random() >= self.rate
            ]
            if not ranked:
                break
            place = min(ranked)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found = (self._ids.get(part, self._unknown) for part in parts)
        return [index for index in found if index is not None]


def _bpe_of(tokenizer: object) -> dict[str, Any] | None:
    """The BPE of a tokenizer as its file holds it; None if it has none that could be done here."""
    if not isinstance(tokenizer, (SimpleTokenizer, HugTokenizer)):
        return None
    if tokenizer.tokenizer.pre_tokenizer is None:
        return None
    model = json.loads(tokenizer.tokenizer.to_str())["model"]
    plain = model["type"] == "BPE" and not model.get("continuing_subword_prefix") and not model.get("byte_fallback")
    return model if plain and not model.get("ignore_merges") else None
