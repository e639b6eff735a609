"""What every tokenizer shares: a batch of texts becomes one padded tensor of ids, ids become a checked list."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

_SHOWN_CHARACTERS = 60


class BatchTokenizer(ABC):
    """Gives a tokenizer with an `encode` method the `tokenize` that data sets and models call."""

    @abstractmethod
    def encode(self, text: str) -> Sequence[int] | torch.Tensor:
        """The ids of one text, without padding."""

    def tokenize(
        self, texts: str | Sequence[str], context_length: int = 256, truncate_text: bool = False
    ) -> torch.Tensor:
        """Encodes texts into one tensor, each row filled up with 0 (padding).

        Args:
            texts: one text or a sequence of them.
            context_length: ids a row; a longer text is an error, or is cut after that many if `truncate_text`.
        Returns: long [B, context_length].
        Raises: TypeError (not text), ValueError (a text too long).
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = torch.as_tensor(self.encode(checked_text(text, "tokenize")), dtype=torch.long)
            if len(ids) > context_length and not truncate_text:
                raise ValueError(
                    f"tokenize: every text must fit context_length={context_length}, got {len(ids)} tokens for "
                    f"{_shown(text)}. Shorten it, raise context_length, or pass truncate_text=True to keep the start."
                )
            row[: len(ids)] = ids[:context_length]
        return rows


def checked_text(text: object, op: str) -> str:
    """`text` itself if it is a str.

    Raises: TypeError.
    """
    if not isinstance(text, str):
        raise TypeError(f"{op}: a text must be a str, got {type(text).__name__}. Decode bytes, or pass a list of str.")
    return text


def id_list(tokens: torch.Tensor | Iterable[int], op: str) -> list[int]:
    """The ids of one text, given as a tensor [n] or an iterable of ints, as a list.

    Raises: ValueError (a tensor of another rank), TypeError (not whole numbers).
    """
    if isinstance(tokens, torch.Tensor):
        if tokens.dim() != 1:
            raise ValueError(
                f"{op}: tokens must be the ids of one text [n], got a tensor {list(tokens.shape)}. Decode row by row."
            )
        tokens = tokens.tolist()
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise TypeError(
            f"{op}: tokens must be whole numbers, got {tokens!r}. Pass ids as tokenize gives them."
        ) from error


def _shown(text: str) -> str:
    """The start of a text, in quotes, for an error message."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
