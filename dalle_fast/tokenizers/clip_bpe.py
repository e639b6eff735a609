"""The byte-pair encoding of CLIP (49,408 tokens), run by the `tokenizers` library.

Source: OpenAI CLIP's `SimpleTokenizer`, as dalle-pytorch ships it: the same ids for the same text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dalle_fast.tokenizers.base import BatchTokenizer, checked_text, id_list
from dalle_fast.tokenizers.merges import N_MERGES, find_clip_merges, read_clip_merges

_START, _END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = (_START, _END)
_WORD_END = "</w>"
# The text is in lower case by then. Contractions, runs of letters, single digits, runs of anything else but spaces.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class SimpleTokenizer(BatchTokenizer):
    """CLIP's byte-pair encoding.

    Args:
        bpe_path: the CLIP merges file, plain or gzip; default: see `find_clip_merges`.
    Raises: FileNotFoundError (no merges file), ValueError (not a merges file).
    """

    vocab_size = 2 * 256 + N_MERGES + len(SPECIAL)  # 49,408: the file has a fixed length

    def __init__(self, bpe_path: str | Path | None = None) -> None:
        self._bpe_path = bpe_path
        self._load()

    def _load(self) -> None:
        """Builds the encoder now, so that a missing file is reported where the tokenizer is made."""
        self.tokenizer  # noqa: B018

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The encoder of cleaned text; `encode` cleans text as CLIP does, which this alone does not."""
        merges = read_clip_merges(find_clip_merges() if self._bpe_path is None else self._bpe_path)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = alphabet + [letter + _WORD_END for letter in alphabet] + [left + right for left, right in merges]
        vocabulary = {word: index for index, word in enumerate([*words, *SPECIAL])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_WORD_END))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of one text: mojibake and HTML entities mended, spaces collapsed, lower case, no start or end token.

        Raises: TypeError (not text).
        """
        ids: list[int] = []
        for piece, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(clean(checked_text(text, "encode"))):
            if piece in SPECIAL:
                ids.append(self.vocab_size - len(SPECIAL) + SPECIAL.index(piece))
            else:
                ids.extend(token.id for token in self.tokenizer.model.tokenize(piece))
        return ids

    def decode(
        self,
        tokens: torch.Tensor | Iterable[int],
        remove_start_end: bool = True,
        pad_tokens: Collection[int] = frozenset(),
    ) -> str:
        """The text of ids, a space after every word.

        Args:
            tokens: [n] ids.
            remove_start_end: leave out the start and end tokens and 0 (padding).
            pad_tokens: further ids to leave out.
        Raises: ValueError (an id outside the vocabulary).
        """
        skipped = set(pad_tokens)
        if remove_start_end:
            skipped |= {0, self.vocab_size - 2, self.vocab_size - 1}
        kept = [token for token in id_list(tokens, "decode") if token not in skipped]
        for token in kept:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"decode: a token must be in 0..{self.vocab_size - 1}, got {token}. "
                    "Name the padding ids of your model in pad_tokens."
                )
        words = [self.tokenizer.id_to_token(token) for token in kept]
        return self.tokenizer.decoder.decode(words).replace(_WORD_END, " ")


class DefaultTokenizer(SimpleTokenizer):
    """A `SimpleTokenizer` that looks for its merges file when it is first used, not when it is made."""

    def _load(self) -> None:
        """Leaves the building to the first use of `tokenizer`."""


def clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()
