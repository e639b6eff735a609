"""Captions become ids: one line of several is chosen, words and merges are left out at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dalle_fast.training.data.bpe_dropout import BpeDropout

_LEAST_WORDS = 3  # a shorter caption keeps all its words


class CaptionTooLong(ValueError):
    """A caption of more ids than the model reads, where none may be cut."""


@dataclass(frozen=True)
class Captions:
    """How captions become ids.

    Args:
        tokenizer: its `encode` gives the ids of a text.   text_seq_len: ids of a caption, the rest is 0.
        truncate: cut a caption that is longer; otherwise it is an error.
        first_caption: how often the first line is taken, else any other; None: all alike.
        word_dropout: how often a caption of at least three words loses one.
        bpe_dropout: share of the merges left out, see bpe_dropout.py.
    Raises: TypeError (a tokenizer that bpe_dropout does not know).
    """

    tokenizer: Any
    text_seq_len: int
    truncate: bool = False
    first_caption: float | None = None
    word_dropout: float = 0.0
    bpe_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.bpe_dropout:
            self._bpe  # noqa: B018

    @cached_property
    def _bpe(self) -> BpeDropout:
        from dalle_fast.training.data.bpe_dropout import BpeDropout  # loads tokenizers, which nothing else here needs

        return BpeDropout(self.tokenizer, self.bpe_dropout)

    def __call__(self, lines: Sequence[str], generator: torch.Generator | None) -> Tensor:
        """long [text_seq_len] of one of the captions; without a generator the first one, whole.

        Raises: CaptionTooLong.
        """
        if generator is None:
            return self._padded(self.whole(lines[0]))
        line = draw_caption(lines, generator, first_caption=self.first_caption, word_dropout=self.word_dropout)
        if not self.bpe_dropout:
            return self._padded(self.whole(line))
        ids = self._bpe.encode(line, int(torch.randint(2**62, (), generator=generator)))
        # Left out merges make a caption longer: cut what would have fitted, refuse what would not.
        if len(ids) > self.text_seq_len:
            self.whole(line)
        return self._padded(ids)

    def whole(self, line: str) -> Sequence[int] | Tensor:
        """The ids of a caption, nothing left out or cut.

        Raises: CaptionTooLong (more than fit, where none may be cut).
        """
        ids: Sequence[int] | Tensor = self.tokenizer.encode(line)
        if len(ids) > self.text_seq_len and not self.truncate:
            raise CaptionTooLong(
                f"a caption must fit text_seq_len={self.text_seq_len}, got {len(ids)} tokens for {line!r:.80}. "
                "Shorten it, or set data.truncate."
            )
        return ids

    def _padded(self, ids: Sequence[int] | Tensor) -> Tensor:
        row = torch.zeros(self.text_seq_len, dtype=torch.long)
        ids = torch.as_tensor(ids[: self.text_seq_len], dtype=torch.long)
        row[: len(ids)] = ids
        return row


def draw_caption(
    lines: Sequence[str], generator: torch.Generator, *, first_caption: float | None, word_dropout: float
) -> str:
    """One of the caption lines, maybe without one of its words; see `Captions`."""
    draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if first_caption is None:
        line = lines[int(draws[1] * len(lines))]
    elif len(lines) == 1 or draws[0] < first_caption:
        line = lines[0]
    else:
        line = lines[1 + int(draws[1] * (len(lines) - 1))]
    words = line.split()
    if len(words) < _LEAST_WORDS or draws[2] >= word_dropout:
        return line
    del words[int(draws[2] / word_dropout * len(words))]
    return " ".join(words)
