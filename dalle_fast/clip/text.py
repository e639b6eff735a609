"""Texts as OpenAI's CLIP reads them: start token, the byte-pair encoding, end token, then zeros."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dalle_fast.tokenizers.base import checked_text
from dalle_fast.tokenizers.clip_bpe import SimpleTokenizer

CONTEXT_LENGTH = 77


class ClipTokenizer:
    """Start and end tokens around the ids of CLIP's byte-pair encoding.

    Args: merges: path of the merges file; default: the one an installed package carries.
    Raises: FileNotFoundError (no merges file), ValueError (not a merges file).
    """

    vocab_size = SimpleTokenizer.vocab_size

    def __init__(self, merges: str | Path | None = None) -> None:
        self._bpe = SimpleTokenizer(merges)

    def tokenize(
        self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
    ) -> Tensor:
        """Ids as `encode_text` takes them.

        Args: truncate: cut a text that is too long, and put the end token last.
        Returns: int64 [B, context_length].
        Raises: TypeError (not text), ValueError (a text too long).
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        start, end = self.vocab_size - 2, self.vocab_size - 1
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [start, *self._bpe.encode(checked_text(text, "clip.tokenize")), end]
            if len(ids) > context_length and not truncate:
                raise ValueError(
                    f"clip.tokenize: a text must have at most {context_length} tokens, start and end included, got "
                    f"{len(ids)} in {text[:60]!r}. Shorten it, or pass truncate=True."
                )
            if len(ids) > context_length:
                ids = [*ids[: context_length - 1], end]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> Tensor:
    """`ClipTokenizer.tokenize` with the merges file of an installed package: OpenAI's `clip.tokenize`."""
    return _default().tokenize(texts, context_length, truncate)


@functools.cache
def _default() -> ClipTokenizer:
    return ClipTokenizer()
