"""What a model was trained to draw: known captions, words a prompt has and they do not, the captions nearest to it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


class KnownCaptions:
    """The captions of a training set, for telling a user which words of a prompt the model has never seen.

    Args: captions: one string each.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self._captions = list(dict.fromkeys(caption.lower() for caption in captions))
        self._words = {word for caption in self._captions for word in _WORD.findall(caption)}

    @classmethod
    def read(cls, path: Path) -> KnownCaptions:
        """From a text file, one caption a line."""
        return cls([line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])

    def __len__(self) -> int:
        return len(self._captions)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that no caption has, in their order, each once."""
        return list(dict.fromkeys(word for word in _WORD.findall(prompt.lower()) if word not in self._words))

    def nearest(self, prompt: str, n: int = 3) -> list[str]:
        """The n captions most like the prompt: by shared words (also misspelt ones) first, then by letters."""
        words = [self._known_spelling(word) for word in _WORD.findall(prompt.lower())]
        wanted = {word for word in words if word is not None}

        def likeness(caption: str) -> tuple[float, float]:
            has = set(_WORD.findall(caption))
            shared = len(has & wanted) / len(has | wanted) if wanted and has else 0.0
            return shared, difflib.SequenceMatcher(None, prompt.lower(), caption).ratio()

        return sorted(self._captions, key=likeness, reverse=True)[:n]

    def _known_spelling(self, word: str) -> str | None:
        if word in self._words:
            return word
        close = difflib.get_close_matches(word, self._words, n=1, cutoff=0.75)
        return close[0] if close else None
