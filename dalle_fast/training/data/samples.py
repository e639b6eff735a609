"""What a data set is to the reader of batches: numbered samples, each with a key, and errors that say what is wrong."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Protocol

from torch import Tensor

_LOG = logging.getLogger(__name__)


class Unusable(Exception):
    """A sample that cannot be used; another takes its place.

    Args: reason: what is counted, a few words.   detail: what the log says beside it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def readable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 replaced, so that it can be hashed, written and shown."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class DataError(ValueError):
    """What ends a training, in a sentence."""


class Samples(Protocol):
    """Numbered samples that are read one by one, in any order and by any process."""

    has_codes: bool  # codes(i) works, picture(i) does not
    skipped: Skipped  # what was left out already

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """What decides whether a sample is held out: the same wherever the data lie."""

    def name(self, index: int) -> str:
        """Which file it is, for people."""

    def picture(self, index: int) -> Path | BinaryIO:
        """The picture's file. Raises: Unusable."""

    def captions(self, index: int) -> list[str]:
        """At least one caption. Raises: Unusable."""

    def codes(self, index: int) -> Tensor:
        """long [image_seq_len]."""


class Skipped:
    """Counts what was left out by reason; the log names each once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._named: set[tuple[str, str]] = set()

    def add(self, name: str, reason: str, detail: str = "") -> None:
        """One sample, or one file, left out."""
        if (name, reason) not in self._named:
            self._named.add((name, reason))
            self.counts[reason] += 1
            _LOG.warning("skipped %s: %s", name, detail or reason)

    def add_many(self, n: int, reason: str, example: str) -> None:
        """Many of one kind, that one line tells of."""
        self.counts[reason] += n
        _LOG.warning("skipped %d: %s, %s the first", n, reason, example)
